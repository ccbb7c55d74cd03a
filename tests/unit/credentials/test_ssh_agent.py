"""The filter in front of an ssh-agent, attacked: what must not be signed is not, and what must work does."""

from itertools import pairwise

import pytest

from cloister.credentials.ssh_agent import FAILURE, SUCCESS, Grant, Ring, SshAgentFilter, Step
from cloister.credentials.ssh_keys import fingerprint
from cloister.credentials.ssh_known_hosts import HostKeys, Place
from cloister.credentials.ssh_wire import Reader, string
from support.ssh_material import (
    SESSION,
    Key,
    bind,
    document,
    listed,
    login,
    make_ecdsa,
    make_ed25519,
    make_rsa,
    sign_request,
)

HOST, OTHER_HOST, STRANGER = make_ed25519(1), make_ed25519(2), make_ed25519(3)
KEY, LOGIN_ONLY, UNNAMED = make_ed25519(10), make_ed25519(11), make_ed25519(12)
NOW = 1_750_000_000.0
PLACE, OTHER = Place("git.example.org"), Place("other.example.org", 2222)
RING = Ring(
    "claude",
    (
        Grant("deploy", fingerprint(LOGIN_ONLY.blob), frozenset({OTHER})),
        Grant("forge", fingerprint(KEY.blob), frozenset({PLACE}), git=True),
    ),
    {PLACE: HostKeys(frozenset({HOST.blob})), OTHER: HostKeys(frozenset({OTHER_HOST.blob}))},
)
SIGNATURE = b"\x0e" + string(string(b"ssh-ed25519") + string(bytes(64)))


def connection(*requests: bytes) -> SshAgentFilter:
    """Return a connection on which requests were made and granted."""
    judge = SshAgentFilter(RING, lambda: NOW)
    for request in requests:
        assert judge.request(request).ask
        judge.answered(SUCCESS)
    return judge


def reason(step: Step) -> str:
    """Return why a request was refused; it went nowhere."""
    assert (step.reply, step.ask) == (FAILURE, b"")
    return step.event.reason if step.event else ""


@pytest.mark.parametrize("host", [None, HOST])
def test_a_login_on_a_bound_connection_is_signed_and_recorded(host: Key | None) -> None:
    """Both methods of OpenSSH pass, unchanged, and the event says who logged in where with what."""
    judge = connection(bind(HOST))
    request = sign_request(KEY, login(KEY, host=host))
    asked = judge.request(request)
    done = judge.answered(SIGNATURE)

    assert (asked.ask, asked.event, done.reply) == (request, None, SIGNATURE)
    assert done.event is not None
    assert (done.event.verdict, done.event.use, done.event.host, done.event.user, done.event.credential) == (
        "allow", "ssh", "git.example.org", "git", "forge"
    )  # fmt: skip


@pytest.mark.parametrize("make", [make_ed25519, make_ecdsa, make_rsa])
def test_every_kind_of_host_key_can_bind(make) -> None:
    """Ed25519, ECDSA and RSA with SHA-2 prove a session; one changed bit of the signature does not."""
    host = make()
    ring = RING._replace(hosts={PLACE: HostKeys(frozenset({host.blob}))})
    good, bad = SshAgentFilter(ring, lambda: NOW), SshAgentFilter(ring, lambda: NOW)
    forged = bytearray(host.sign(SESSION))
    forged[-1] ^= 1

    assert good.request(bind(host)).ask
    assert good.answered(SUCCESS).reply == SUCCESS
    assert reason(bad.request(bind(host, signature=bytes(forged)))) == "bind-forged"


def test_an_old_agent_that_knows_no_binding_changes_nothing() -> None:
    """The client is told what the filter found; keys that the agent limits itself are the agent's affair."""
    judge = SshAgentFilter(RING, lambda: NOW)
    judge.request(bind(HOST))

    assert judge.answered(FAILURE).reply == SUCCESS
    assert judge.request(sign_request(KEY, login(KEY))).ask


def test_a_commit_is_signed_without_a_host() -> None:
    """SSHSIG for git passes on an unbound connection, and is recorded as that."""
    judge = connection()
    assert judge.request(sign_request(KEY, document())).ask
    done = judge.answered(SIGNATURE)

    assert done.event is not None
    assert (done.event.use, done.event.namespace, done.event.host) == ("git", "git", "")


def test_what_the_agent_does_not_sign_is_recorded_as_that() -> None:
    """A no of the person, and an agent that is gone, reach the client as failure and the record as failed."""
    judge = connection(bind(HOST))
    judge.request(sign_request(KEY, login(KEY)))
    refused = judge.answered(FAILURE)
    judge.request(sign_request(KEY, login(KEY)))
    gone = judge.unreachable()

    assert (refused.reply, gone.reply) == (FAILURE, FAILURE)
    assert refused.event is not None
    assert gone.event is not None
    assert (refused.event.reason, gone.event.reason) == ("agent-refused", "agent-unreachable")
    assert {refused.event.verdict, gone.event.verdict} == {"failed"}


@pytest.mark.parametrize(
    ("before", "request_", "expected"),
    [
        ((), sign_request(KEY, login(KEY)), "bind-missing"),
        ((bind(OTHER_HOST),), sign_request(KEY, login(KEY)), "key-not-for-host"),
        ((bind(HOST),), sign_request(LOGIN_ONLY, login(LOGIN_ONLY)), "key-not-for-host"),
        ((bind(HOST),), sign_request(UNNAMED, login(UNNAMED)), "key-not-named"),
        ((bind(HOST),), sign_request(KEY, login(KEY, SESSION[::-1])), "session-mismatch"),
        ((bind(HOST),), sign_request(KEY, login(KEY, SESSION[:-1])), "session-mismatch"),
        ((bind(HOST),), sign_request(KEY, login(KEY, host=OTHER_HOST)), "host-mismatch"),
        ((bind(HOST),), sign_request(KEY, login(LOGIN_ONLY)), "key-mismatch"),
        ((bind(HOST),), sign_request(KEY, login(KEY, algorithm=b"ssh-rsa")), "key-mismatch"),
        ((bind(HOST),), sign_request(KEY, login(KEY), 2), "flags-refused"),
        ((bind(HOST),), sign_request(KEY, login(KEY) + b"\0"), "data-refused"),
        ((bind(HOST),), sign_request(KEY, login(KEY).replace(b"\x01\0\0\0\x0b", b"\0\0\0\0\x0b")), "data-refused"),
        ((bind(HOST),), sign_request(KEY, login(KEY).replace(b"ssh-connection", b"ssh-userauth!!")), "data-refused"),
        ((bind(HOST),), sign_request(KEY, b"anything at all"), "data-refused"),
        ((bind(HOST),), sign_request(KEY, b""), "data-refused"),
        ((bind(HOST),), sign_request(KEY, SESSION), "data-refused"),
        ((bind(HOST),), sign_request(KEY, login(KEY)) + b"\0", "request-malformed"),
        ((bind(HOST),), sign_request(KEY, login(KEY))[:-1], "request-malformed"),
        ((), sign_request(KEY, document(b"file")), "namespace-refused"),
        ((), sign_request(KEY, document(b"git\0")), "data-refused"),
        ((), sign_request(KEY, document(b"")), "data-refused"),
        ((), sign_request(KEY, document(digest=bytes(32))), "data-refused"),
        ((), sign_request(KEY, document(algorithm=b"md5", digest=bytes(16))), "data-refused"),
        ((), sign_request(KEY, document() + b"\0"), "data-refused"),
        ((), sign_request(LOGIN_ONLY, document()), "key-not-for-git"),
        ((), sign_request(UNNAMED, document()), "key-not-named"),
        ((), bind(STRANGER), "host-not-allowed"),
        ((), bind(HOST, signature=STRANGER.sign(SESSION)), "bind-forged"),
        ((), bind(HOST, signature=HOST.sign(SESSION[::-1])), "bind-forged"),
        ((), bind(HOST, b"short"), "bind-forged"),
        ((), bind(HOST, b""), "bind-forged"),
        ((), bind(HOST, forwarding=1), "bind-forwarded"),
        ((), bind(HOST, forwarding=2), "request-malformed"),
        ((), bind(HOST) + b"\0", "request-malformed"),
        ((bind(HOST),), bind(HOST), "bind-again"),
        ((bind(HOST),), bind(OTHER_HOST), "bind-again"),
    ],
)
def test_attacks_get_no_signature(before: tuple[bytes, ...], request_: bytes, expected: str) -> None:
    """Each way to have something else signed, or elsewhere, fails with its own reason and never reaches the agent."""
    judge = connection(*before)

    assert reason(judge.request(request_)) == expected


def test_a_failed_binding_cannot_be_repaired() -> None:
    """After a forged binding a good one is refused, so a connection is one host's or nobody's; no key is shown."""
    judge = SshAgentFilter(RING, lambda: NOW)
    assert reason(judge.request(bind(STRANGER))) == "host-not-allowed"
    assert reason(judge.request(bind(HOST))) == "bind-again"
    assert reason(judge.request(sign_request(KEY, login(KEY)))) == "bind-missing"
    judge.request(b"\x0b")

    assert judge.answered(listed(KEY, LOGIN_ONLY)).reply == listed()


@pytest.mark.parametrize("kind", [*range(11), 12, *range(14, 27), *range(28, 256)])
def test_no_other_request_exists(kind: int) -> None:
    """Adding, removing, locking, smart cards, constraints and all unknown numbers fail, whatever follows them."""
    for body in (b"", string(KEY.blob), sign_request(KEY, document())[1:]):
        assert reason(connection(bind(HOST)).request(bytes([kind]) + body)) == "request-refused"


@pytest.mark.parametrize(
    "name", [b"query", b"restrict-destination-v00@openssh.com", b"session-bind@openssh.com\0", b""]
)
def test_no_other_extension_exists(name: bytes) -> None:
    """Only the binding is known."""
    assert reason(connection().request(b"\x1b" + string(name))) == ""


def test_the_list_shows_named_keys_only_and_no_comment() -> None:
    """Keys that sign commits come first; names of people and machines in comments stay outside."""
    judge = connection()
    assert judge.request(b"\x0b").ask == b"\x0b"
    reply = judge.answered(listed(UNNAMED, LOGIN_ONLY, KEY)).reply

    assert reply.index(KEY.blob) < reply.index(LOGIN_ONLY.blob)
    assert UNNAMED.blob not in reply
    assert b"secret-laptop" not in reply
    assert b"forge" in reply


@pytest.mark.parametrize(("host", "shown"), [(HOST, KEY), (OTHER_HOST, LOGIN_ONLY)])
def test_a_bound_host_is_offered_its_own_key(host: Key, shown: Key) -> None:
    """A server does not learn which other keys the person has."""
    judge = connection(bind(host))
    judge.request(b"\x0b")
    reader = Reader(judge.answered(listed(UNNAMED, LOGIN_ONLY, KEY)).reply)

    assert (reader.byte(), reader.u32(), reader.string()) == (12, 1, shown.blob)


@pytest.mark.parametrize(
    "answer", [b"", b"\x05", b"\x0c", b"\x0c\xff\xff\xff\xff", b"\x0e" + string(b"x") + b"y", b"\x06"]
)
def test_a_broken_agent_is_no_way_in(answer: bytes) -> None:
    """Answers that are not what was asked for become failure, for lists and for signatures."""
    judge = connection(bind(HOST))
    judge.request(b"\x0b")
    first = judge.answered(answer)
    judge.request(sign_request(KEY, login(KEY)))
    second = judge.answered(answer)

    assert (first.reply, second.reply) == (FAILURE, FAILURE)
    assert second.event is not None
    assert second.event.verdict == "failed"


def test_two_hosts_with_one_key_are_both_meant() -> None:
    """A host key that belongs to two names lets the keys of either log in, as it cannot be told which one it was."""
    ring = RING._replace(hosts={PLACE: HostKeys(frozenset({HOST.blob})), OTHER: HostKeys(frozenset({HOST.blob}))})
    for key in (KEY, LOGIN_ONLY):
        judge = SshAgentFilter(ring, lambda: NOW)
        judge.request(bind(HOST))
        judge.answered(SUCCESS)
        assert judge.request(sign_request(key, login(key))).ask


def test_reasons_differ() -> None:
    """Every attack above is told apart: neighbours in this list are different sentences."""
    judge = connection(bind(HOST))
    texts = [
        step.event.explanation
        for data in (login(KEY, SESSION[::-1]), login(KEY, host=OTHER_HOST), b"x", document(b"file"))
        if (step := judge.request(sign_request(KEY, data))).event
    ]

    assert len(texts) == 4
    assert all(first != second for first, second in pairwise(texts))
