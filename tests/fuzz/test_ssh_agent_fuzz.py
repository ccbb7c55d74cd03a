"""The ssh-agent filter and its parsers against any bytes: no crash, and nothing passes that was not to pass."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.credentials import ssh_blobs, ssh_keys
from cloister.credentials.ssh_agent import FAILURE, SUCCESS, Grant, Ring, SshAgentFilter
from cloister.credentials.ssh_keys import fingerprint
from cloister.credentials.ssh_known_hosts import HostKeys, KnownHosts, KnownHostsError, Place
from cloister.credentials.ssh_wire import Reader, WireError
from support.ssh_material import SESSION, bind, document, listed, login, make_ed25519, sign_request

HOST, KEY, UNNAMED = make_ed25519(1), make_ed25519(10), make_ed25519(12)
NOW = 1_750_000_000.0
PLACE = Place("git.example.org")
RING = Ring(
    "claude",
    (Grant("forge", fingerprint(KEY.blob), frozenset({PLACE}), git=True),),
    {PLACE: HostKeys(frozenset({HOST.blob}))},
)
SEEDS = (b"\x0b", bind(HOST), sign_request(KEY, login(KEY)), sign_request(KEY, login(KEY, host=HOST)),
         sign_request(KEY, document()), sign_request(UNNAMED, document()))  # fmt: skip
GOOD = {login(KEY), login(KEY, host=HOST)}


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A good request with some bytes changed, cut or put in."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=4))
    return bytes(data)


def judge_all(requests: list[bytes]) -> None:
    """Send requests one after the other; check what may reach the agent, with a parser of its own."""
    judge = SshAgentFilter(RING, lambda: NOW)
    for request in requests:
        step = judge.request(request)
        assert bool(step.ask) != bool(step.reply)
        if not step.ask:
            assert step.reply == FAILURE
            continue
        assert step.ask == request
        reader = Reader(request)
        kind = reader.byte()
        assert kind in {11, 13, 27}
        if kind == 13:
            assert reader.string() == KEY.blob
            data = reader.string()
            parsed = ssh_blobs.parse(data)
            if isinstance(parsed, ssh_blobs.Login):
                assert parsed.session == SESSION
                assert parsed.key == KEY.blob
                assert parsed.host_key in {b"", HOST.blob}
            else:
                assert parsed.namespace == "git"
        judge.answered(listed(KEY, UNNAMED) if kind == 11 else SUCCESS)


@given(st.lists(st.binary(max_size=200), max_size=4))
def test_any_bytes_are_judged(requests: list[bytes]) -> None:
    """No bytes crash it."""
    judge_all(requests)


@given(st.lists(mutated(), max_size=5))
def test_changed_requests_never_pass_as_something_else(requests: list[bytes]) -> None:
    """Whatever is changed, only the named key signs, and only this session's logins and git's documents."""
    judge_all(requests)


@given(st.binary(max_size=300))
def test_any_answer_of_the_agent_is_safe(answer: bytes) -> None:
    """An agent that answers with anything shows no unnamed key."""
    judge = SshAgentFilter(RING, lambda: NOW)
    judge.request(b"\x0b")

    assert UNNAMED.blob not in judge.answered(answer + UNNAMED.blob).reply


@given(st.binary(max_size=300), st.binary(max_size=100), st.binary(max_size=100))
def test_keys_and_signatures_of_any_bytes_are_refused_cleanly(blob: bytes, signature: bytes, data: bytes) -> None:
    """The check of a signature answers no, or says what is malformed."""
    try:
        assert not ssh_keys.verifies(blob, signature, data)
    except WireError:
        return


@given(st.text(max_size=300))
def test_any_known_hosts_can_be_asked(text: str) -> None:
    """Files of any text give an answer, or the one error that they have."""
    try:
        KnownHosts([text]).about(PLACE)
    except KnownHostsError:
        assert "@revoked" in text


def test_the_seeds_are_good() -> None:
    """The mutations begin at requests that pass: else they would prove little."""
    judge = SshAgentFilter(RING, lambda: NOW)
    passed = []
    for seed in (SEEDS[1], SEEDS[0], *SEEDS[2:5]):
        passed.append(bool(judge.request(seed).ask))
        judge.answered(SUCCESS)

    assert passed == [True] * 5
    with pytest.raises(WireError):
        ssh_blobs.parse(b"")
