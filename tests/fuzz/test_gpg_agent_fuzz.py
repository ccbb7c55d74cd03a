"""The gpg-agent filter against any lines and any answers: no crash, and only the lines of a signature pass."""

import re

from hypothesis import given
from hypothesis import strategies as st

from cloister.credentials.gpg_agent import GpgAgentFilter, GpgGrant

GRIP, OTHER = "A" * 40, "B" * 40
DIGEST = "0123456789abcdef" * 4
WORDS = ("RESET", "SIGKEY", "SETKEY", "SETHASH", "PKSIGN", "HAVEKEY", "KEYINFO", "GETINFO", "SETKEYDESC", "PKDECRYPT",
         "8", "10", "--hash=sha256", GRIP, OTHER, DIGEST, DIGEST * 2, "version", "--list", "")  # fmt: skip
PASSED = re.compile(
    rf"RESET|GETINFO (?:version|restricted)|HAVEKEY {GRIP}(?: {GRIP})*|KEYINFO {GRIP}|SIGKEY {GRIP}|SETKEY {GRIP}"
    r"|SETKEYDESC The\+agent\+claude[^ ]*|SETHASH [-=a-z0-9]+ [0-9A-Fa-f]{56,128}|PKSIGN"
)
answers = st.sampled_from([b"OK", b"ERR 1 no", b"OK done"]) | st.binary(max_size=40).filter(
    lambda line: b"\n" not in line
)


def judge_all(lines: list[bytes], last: bytes) -> None:
    """Send lines; check what reaches the agent, and that a signature follows a key and a digest."""
    filter_ = GpgAgentFilter("claude", [GpgGrant("sign", "F" * 40, frozenset({GRIP}))])
    chosen = hashed = False
    for line in lines:
        step = filter_.request(line)
        assert bool(step.ask) != bool(step.reply)
        if not step.ask:
            continue
        asked = step.ask.decode("ascii")
        assert asked.endswith("\n")
        assert PASSED.fullmatch(asked[:-1]), asked
        command = asked.split()[0]
        if command == "PKSIGN":
            assert chosen
            assert hashed
        good = last == b"OK" or last.startswith(b"OK ")
        chosen = {"RESET": False, "SIGKEY": good, "SETKEY": good}.get(command, chosen)
        hashed = {"RESET": False, "SETHASH": good, "PKSIGN": False}.get(command, hashed)
        reply = filter_.answered([b"S x", last]).reply
        assert reply.endswith(b"\n")


@given(st.lists(st.binary(max_size=80), max_size=6), answers)
def test_any_bytes_are_judged(lines: list[bytes], last: bytes) -> None:
    """No bytes crash it, whatever the agent answers."""
    judge_all(lines, last)


@given(st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join), max_size=10), answers)
def test_any_talk_passes_only_what_signs(lines: list[str], last: bytes) -> None:
    """Words of the protocol in any order never reach the agent as something else."""
    judge_all([line.encode() for line in lines], last)
