"""The filter in front of a person's gpg-agent: an agent inside may sign with named keys, and nothing else.

The Assuan protocol of gpg-agent(1), "Agent's Assuan Protocol", line by line. What gpg(1) sends to
make a signature passes; decryption, export, import, generation, deletion, passphrases, smart
cards and the agent's own life do not exist here. Options of a client are accepted and dropped, and
the words that a person reads when asked for a passphrase are ours: an agent must not write them.

One thing cannot be told apart: the agent sees only a digest, so a key that also certifies or logs
in could be made to do that. `host/gpg_keys.py` takes parts that only sign, where there are any.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import quote_plus

from cloister.credentials.signing import SigningEvent, denied

MAX_LINE = 1000
"""Bytes of one line without its end (libassuan, ASSUAN_LINELENGTH)."""
MAX_ANSWER = 64 * 1024
"""Bytes of one answer of the agent."""
GREETING = b"OK Pleased to meet you\n"
_OK, _BYE = b"OK\n", b"OK closing connection\n"
# Codes of libgpg-error, with gpg-agent as the source (4 << 24): what gpg(1) expects in these places.
_FORBIDDEN = b"ERR 67109115 Forbidden <cloister>\n"
_NO_KEY = b"ERR 67108881 No secret key <cloister>\n"
_MALFORMED = b"ERR 67109144 IPC parameter error <cloister>\n"
_GONE = b"ERR 67108942 No agent running <cloister>\n"
_GRIP = re.compile(r"[0-9A-F]{40}")
_OPTION = re.compile(
    r"(?:ttyname|ttytype|display|xauthority|putenv|lc-ctype|lc-messages|allow-pinentry-notify|agent-awareness"
    r"|use-cache-for-signing)\b"
)
_DIGESTS = {"8": 64, "9": 96, "10": 128, "11": 56, "sha256": 64, "sha384": 96, "sha512": 128, "sha224": 56}
"""SHA-2 by OpenPGP's numbers (RFC 9580, section 9.5) and libgcrypt's names, with their hexadecimal digits."""
_ASKED_ONLY = frozenset({"version", "restricted"})
_COMMAND = re.compile(r"[A-Z_]{1,32}")


class GpgGrant(NamedTuple):
    """One key of the policy: the keygrips of its parts that sign."""

    credential: str
    key: str
    """The fingerprint, as the policy has it."""
    grips: frozenset[str]


class GpgStep(NamedTuple):
    """What to do next: answer the client, or ask the agent first; and what to record."""

    reply: bytes = b""
    ask: bytes = b""
    event: SigningEvent | None = None
    close: bool = False


class GpgAgentFilter:
    """One connection of a client. Lines come one at a time; `answered` follows each `GpgStep.ask`."""

    def __init__(self, agent: str, grants: Sequence[GpgGrant]) -> None:
        """Know the keys and the name of the agent, for the person who is asked."""
        self._agent = agent
        self._grants = {grip: grant for grant in grants for grip in grant.grips}
        self._chosen = ""
        self._hashed = False
        self._asked = ""

    def request(self, line: bytes) -> GpgStep:
        """Judge one line of the client, without its end."""
        try:
            text = line.decode("ascii")
        except UnicodeDecodeError:
            text = ""
        command, _, rest = text.partition(" ")
        command = command.upper()
        if len(line) > MAX_LINE or not text.isprintable() or not _COMMAND.fullmatch(command):
            return GpgStep(_MALFORMED, event=denied("request-malformed", "a line to the gpg-agent cannot be read"))
        return self._judge(command, rest.strip())

    def answered(self, lines: Sequence[bytes]) -> GpgStep:
        """Turn the agent's answer, lines without their ends, into what the client gets."""
        asked, self._asked = self._asked, ""
        last = lines[-1] if lines else b""
        good = last == b"OK" or last.startswith(b"OK ")
        reply = _OK if good else _error(last)
        if asked in {"PKSIGN", "GETINFO"} and good:
            reply = b"".join(line + b"\n" for line in lines if line.startswith(b"D ")) + _OK
        if asked == "KEYINFO" and good:
            reply = b"".join(line + b"\n" for line in lines if self._is_info(line)) + _OK
        if asked in {"SIGKEY", "SETKEY"} and not good:
            self._chosen = ""
        if asked == "SETHASH":
            self._hashed = good
        return GpgStep(reply, event=self._signed(good) if asked == "PKSIGN" else None)

    def unreachable(self) -> GpgStep:
        """Answer for an agent that cannot be asked."""
        self._asked = ""
        why = "the person's gpg-agent does not answer"
        event = SigningEvent(
            "failed", "agent-unreachable", use="gpg", explanation=why, remedy="gpgconf --launch gpg-agent"
        )
        return GpgStep(_GONE, event=event, close=True)

    def _judge(self, command: str, rest: str) -> GpgStep:
        match command:
            case "NOP":
                return GpgStep(_OK)
            case "BYE":
                return GpgStep(_BYE, close=True)
            case "OPTION":
                return GpgStep(_OK if _OPTION.match(rest) else _FORBIDDEN)  # how a person is asked is theirs to set
            case "RESET":
                self._chosen, self._hashed = "", False
                return self._ask(command)
            case "GETINFO" if rest in _ASKED_ONLY:
                return self._ask(command, rest)
            case "GETINFO" | "SCD":
                return GpgStep(_FORBIDDEN)  # gpg asks this by itself before every signature: no news
            case "HAVEKEY" | "KEYINFO" | "SIGKEY" | "SETKEY":
                return self._about_key(command, rest)
            case "SETKEYDESC" | "SETHASH" | "PKSIGN":
                return self._toward_signature(command, rest)
            case _:
                why = f"the gpg-agent signs here; {command} does something else"
                return GpgStep(_FORBIDDEN, event=denied("request-refused", why, use="gpg"))

    def _toward_signature(self, command: str, rest: str) -> GpgStep:
        if command == "SETHASH":
            return self._set_hash(rest)
        if command == "PKSIGN":
            return self._sign()
        words = f"The agent {self._agent} in its sandbox asks for a signature with your OpenPGP key."
        return self._ask(command, quote_plus(words))

    def _ask(self, command: str, rest: str = "") -> GpgStep:
        self._asked = command
        return GpgStep(ask=f"{command} {rest}".strip().encode("ascii") + b"\n")

    def _about_key(self, command: str, rest: str) -> GpgStep:
        """Let the named ones of the keygrips through; a client may ask for others, but learns nothing."""
        grips = rest.split()
        if not grips or not all(_GRIP.fullmatch(grip) for grip in grips):
            return GpgStep(_FORBIDDEN)
        named = [grip for grip in grips if grip in self._grants]
        if command == "HAVEKEY":
            return self._ask(command, " ".join(named)) if named else GpgStep(_NO_KEY)
        if len(grips) != 1 or not named:
            if command == "KEYINFO":
                return GpgStep(_NO_KEY)
            self._chosen = ""
            why = f"the policy does not name the key with the keygrip {grips[0]}"
            remedy = f"add gpg:FINGERPRINT to keys in [agents.{self._agent}.credentials.NAME]"
            return GpgStep(_NO_KEY, event=denied("key-not-named", why, remedy, use="gpg", key=grips[0]))
        if command != "KEYINFO":
            self._chosen = named[0]
        return self._ask(command, named[0])

    def _set_hash(self, rest: str) -> GpgStep:
        """Take a SHA-2 digest in full."""
        self._hashed = False
        words = rest.split()
        name = words[0].removeprefix("--hash=") if len(words) == 2 else ""  # noqa: PLR2004  # algorithm and digest
        digits = _DIGESTS.get(name, 0)
        if not digits or not re.fullmatch(r"[0-9A-Fa-f]+", words[1]) or len(words[1]) != digits:
            return GpgStep(_MALFORMED, event=denied("data-refused", "only SHA-2 digests are signed", use="gpg"))
        return self._ask("SETHASH", f"{words[0]} {words[1]}")

    def _sign(self) -> GpgStep:
        if not self._chosen or not self._hashed:
            why = "a signature needs a named key and a digest first"
            return GpgStep(_FORBIDDEN, event=denied("key-not-chosen", why, use="gpg", key=self._chosen))
        self._hashed = False
        return self._ask("PKSIGN")

    def _signed(self, good: bool) -> SigningEvent:
        grant = self._grants[self._chosen]
        if good:
            return SigningEvent("allow", "signed", use="gpg", key=grant.key, credential=grant.credential)
        why = "the person's gpg-agent did not sign: nobody gave the passphrase, or the key is not there"
        remedy = "gpg --list-secret-keys outside of the sandbox"
        return SigningEvent(
            "failed", "agent-refused", use="gpg", key=grant.key, credential=grant.credential,
            explanation=why, remedy=remedy,
        )  # fmt: skip

    def _is_info(self, line: bytes) -> bool:
        words = line.split(b" ", 3)
        return words[:2] == [b"S", b"KEYINFO"] and b"".join(words[2:3]).decode("ascii", "replace") in self._grants


def _error(line: bytes) -> bytes:
    """Return the agent's error, if it is one that can be shown; gpg tells the person by its number."""
    return line + b"\n" if re.fullmatch(rb"ERR [0-9]{1,10}[ -~]{0,200}", line) else _FORBIDDEN
