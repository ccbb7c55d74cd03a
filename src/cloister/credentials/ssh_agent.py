"""The filter in front of a person's ssh-agent: an agent inside may list and use named keys, and nothing else.

Three requests of draft-miller-ssh-agent (OpenSSH, PROTOCOL.agent) exist here: the list of keys,
`session-bind@openssh.com`, and a signature. A signature is for one of two things:

- logging in: the connection was bound to a host key by a signature of that key over the session's
  id, the key is one of an allowed host, and the blob names that session and that key;
- a git commit or tag: an SSHSIG blob of the namespace `git`.

Anything else is answered with failure and never reaches the agent. One object per connection,
without input or output: messages in, messages out. Carrying them is for `relay`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from cloister.credentials import ssh_blobs, ssh_certificates, ssh_keys
from cloister.credentials.signing import MAX_SHOWN, SigningEvent, denied
from cloister.credentials.ssh_blobs import Document, Login
from cloister.credentials.ssh_certificates import Certificate
from cloister.credentials.ssh_known_hosts import HostKeys, Place
from cloister.credentials.ssh_wire import Reader, WireError, string

MAX_MESSAGE = 256 * 1024
"""Bytes of one message, as OpenSSH has it (AGENT_MAX_LEN, authfd.c)."""
FAILURE, SUCCESS = b"\x05", b"\x06"
_LIST, _LISTED, _SIGN, _SIGNED, _EXTENSION = 11, 12, 13, 14, 27
_BIND = b"session-bind@openssh.com"
_MIN_SESSION = 20
"""Bytes of a session's id: the digest of the key exchange, SHA-1 at least (RFC 4253, section 7.2)."""
_MAX_KEYS = 4096
_FLAGS = {"ssh-rsa": {2: "rsa-sha2-256", 4: "rsa-sha2-512"}}
NAMESPACE = "git"


class Grant(NamedTuple):
    """One key of the policy."""

    credential: str
    key: str
    """Its fingerprint, `SHA256:…`."""
    places: frozenset[Place] = frozenset()
    """Where it may log in."""
    git: bool = False
    """Whether it may sign commits and tags."""


class Ring(NamedTuple):
    """The keys of one run and the hosts they are for."""

    agent: str
    grants: tuple[Grant, ...]
    hosts: Mapping[Place, HostKeys]
    revoked: frozenset[bytes] = frozenset()
    """Host keys and authorities that were taken back."""


class Step(NamedTuple):
    """What to do next: answer the client, or ask the agent first; and what to record."""

    reply: bytes = b""
    ask: bytes = b""
    event: SigningEvent | None = None


class _Refused(Exception):  # noqa: N818  # an outcome, not an error
    """A request that goes no further."""

    def __init__(self, event: SigningEvent) -> None:
        super().__init__(event.explanation)
        self.event = event


class _Bound(NamedTuple):
    """What a connection is bound to."""

    session: bytes
    host_key: bytes
    places: frozenset[Place]


class SshAgentFilter:
    """One connection of a client. Requests come one at a time; `answered` follows each `Step.ask`."""

    def __init__(self, ring: Ring, now: Callable[[], float]) -> None:
        """Know the keys and the time, in seconds since the epoch; be bound to nothing."""
        self._ring = ring
        self._now = now
        self._bind_seen = False
        self._bound: _Bound | None = None
        self._asked = b""
        self._signing: SigningEvent | None = None

    def request(self, message: bytes) -> Step:
        """Judge one request of the client."""
        try:
            return self._request(message)
        except _Refused as refused:
            return Step(reply=FAILURE, event=refused.event)
        except WireError as error:
            why = f"a request to the ssh-agent cannot be read: {error}"
            return Step(reply=FAILURE, event=denied("request-malformed", why))

    def answered(self, message: bytes) -> Step:
        """Turn the agent's answer to the last question into what the client gets."""
        asked, self._asked = self._asked, b""
        if asked == _BIND:
            return Step(reply=SUCCESS)  # the agent needs it for keys that it limits itself; our own check counts
        try:
            reply = self._listed(message) if asked == bytes([_LIST]) else _signed(message)
        except WireError:
            reply = FAILURE
        if asked == bytes([_LIST]):
            return Step(reply=reply)
        event, self._signing = self._signing, None
        return Step(reply=reply, event=_failed(event) if event and reply == FAILURE else event)

    def unreachable(self) -> Step:
        """Answer for an agent that cannot be asked."""
        event, self._signing, self._asked = self._signing, None, b""
        why = "the person's ssh-agent does not answer"
        remedy = "start the run where SSH_AUTH_SOCK names a living ssh-agent"
        base = event or SigningEvent("failed", "", use="ssh")
        return Step(reply=FAILURE, event=_failed(base, "agent-unreachable", why, remedy))

    def _request(self, message: bytes) -> Step:
        reader = Reader(message)
        kind = reader.byte()
        if kind == _LIST:
            reader.end()
            self._asked = bytes([_LIST])
            return Step(ask=message)
        if kind == _SIGN:
            self._signing = self._sign(reader)
            self._asked = bytes([_SIGN])
            return Step(ask=message)
        if kind == _EXTENSION:
            name = reader.string()
            if name == _BIND:
                self._bind(reader)
                self._asked = _BIND
                return Step(ask=message)
            return Step(reply=FAILURE)  # `query` and the like: not known here is the protocol's own answer
        why = f"keys can be listed and used here; the request {kind} of the ssh-agent protocol does something else"
        raise _Refused(denied("request-refused", why, "use ssh-add outside of the sandbox"))

    # --- binding ----------------------------------------------------------------------------

    def _bind(self, reader: Reader) -> None:
        """Bind this connection to a host, once (OpenSSH, PROTOCOL.agent section 1).

        Raises:
            _Refused: it stays unbound, and cannot be bound any more.
        """
        host_key, session, signature = reader.string(), reader.string(), reader.string()
        forwarding = reader.boolean()
        reader.end()
        if self._bind_seen:
            why = "a connection to the ssh-agent is bound once; this one was bound before"
            raise _Refused(denied("bind-again", why, use="ssh"))
        self._bind_seen = True
        if forwarding:
            why = "a forwarded agent would let the remote host use the keys"
            raise _Refused(denied("bind-forwarded", why, "do without ssh -A", use="ssh"))
        name = ssh_keys.fingerprint(host_key)
        certificate = ssh_certificates.parse(host_key) if ssh_certificates.is_certificate(host_key) else None
        places = self._places(host_key, certificate)
        if not places:
            why = f"the host key {name} belongs to no host that this run's keys are for"
            remedy = (
                f"add the host to hosts in [agents.{self._ring.agent}.credentials.NAME]; known_hosts must have its key"
            )
            raise _Refused(denied("host-not-allowed", why, remedy, use="ssh"))
        # Only now, when the key is a known one: checking a stranger's would be work for whoever asks.
        proof = certificate.key if certificate else host_key
        if len(session) < _MIN_SESSION or not ssh_keys.verifies(proof, signature, session):
            why = f"the host key {name} has not signed this session"
            raise _Refused(denied("bind-forged", why, use="ssh"))
        self._bound = _Bound(session, host_key, places)

    def _places(self, host_key: bytes, certificate: Certificate | None) -> frozenset[Place]:
        """Return the allowed places that a host key, or a certificate, stands for."""
        hosts, revoked = self._ring.hosts.items(), self._ring.revoked
        if certificate is None:
            return frozenset(place for place, known in hosts if host_key in known.keys)
        now = self._now()
        return frozenset(
            place for place, known in hosts if certificate.speaks_for(place, known.authorities, revoked, now)
        )

    # --- signing ------------------------------------------------------------------------------

    def _sign(self, reader: Reader) -> SigningEvent:
        """Return the event of the signature that may be made.

        Raises:
            _Refused: it may not.
        """
        key, data, flags = reader.string(), reader.string(), reader.u32()
        reader.end()
        kind, name = ssh_keys.key_type(key), ssh_keys.fingerprint(key)
        algorithm = _FLAGS.get(kind, {0: kind}).get(flags)
        if algorithm is None:
            why = f"no signature with the flags {flags} is made with a key of the kind {kind[:64]}"
            raise _Refused(denied("flags-refused", why, key=name))
        try:
            wanted = ssh_blobs.parse(data)
        except WireError as error:
            why = f"only logins and commits are signed, and this is neither: {error}"
            raise _Refused(denied("data-refused", why, key=name)) from None
        if isinstance(wanted, Document):
            return self._sign_document(name, wanted)
        if wanted.key != key or wanted.algorithm != algorithm:
            why = "the request to log in names another key or algorithm than the one that shall sign it"
            raise _Refused(denied("key-mismatch", why, use="ssh", key=name))
        return self._sign_login(name, wanted)

    def _sign_document(self, name: str, wanted: Document) -> SigningEvent:
        if wanted.namespace != NAMESPACE:
            why = f"documents are signed for git; this one is for {wanted.namespace[:MAX_SHOWN]}"
            raise _Refused(denied("namespace-refused", why, use="git", key=name))
        grant = next((one for one in self._named(name, "git") if one.git), None)
        if grant is None:
            why = f"the policy does not let the key {name} sign commits"
            remedy = f'add "git" to uses of the key in [agents.{self._ring.agent}.credentials]'
            raise _Refused(denied("key-not-for-git", why, remedy, use="git", key=name))
        return SigningEvent(
            "allow", "signed", use="git", key=name, credential=grant.credential, namespace=wanted.namespace
        )

    def _sign_login(self, name: str, wanted: Login) -> SigningEvent:
        named, bound = self._named(name, "ssh"), self._bound
        if bound is None:
            why = "no login is signed on a connection that was not bound to an allowed host (session-bind@openssh.com)"
            raise _Refused(denied("bind-missing", why, "use OpenSSH 8.9 or later inside", use="ssh", key=name))
        if wanted.session != bound.session:
            why = "the login is for another session than the one this connection was bound to"
            raise _Refused(denied("session-mismatch", why, use="ssh", key=name))
        if wanted.method == ssh_blobs.HOST_BOUND and wanted.host_key != bound.host_key:
            why = "the login is for another host than the one this connection was bound to"
            raise _Refused(denied("host-mismatch", why, use="ssh", key=name))
        host = ", ".join(sorted(place.text for place in bound.places))
        grant = next((one for one in named if one.places & bound.places), None)
        if grant is None:
            remedy = f"add it to hosts of the key in [agents.{self._ring.agent}.credentials]"
            why = f"the policy does not let the key {name} log in to {host}"
            raise _Refused(denied("key-not-for-host", why, remedy, use="ssh", key=name))
        host = ", ".join(sorted(place.text for place in grant.places & bound.places))
        user = wanted.user[:MAX_SHOWN]
        return SigningEvent("allow", "signed", use="ssh", key=name, credential=grant.credential, host=host, user=user)

    def _named(self, name: str, use: str) -> list[Grant]:
        """Return what the policy says about a key.

        Raises:
            _Refused: nothing.
        """
        found = [grant for grant in self._ring.grants if grant.key == name]
        if not found:
            why = f"the policy does not name the key {name}"
            remedy = f"add it to keys in [agents.{self._ring.agent}.credentials.NAME]"
            raise _Refused(denied("key-not-named", why, remedy, use="ssh" if use == "ssh" else "git", key=name))
        return found

    # --- listing ------------------------------------------------------------------------------

    def _listed(self, message: bytes) -> bytes:
        """Return the named keys of the agent's answer; a host that was bound is shown its own, a refused one none.

        Comments are replaced by the credential's name: they hold names of people and machines.
        """
        reader = Reader(message)
        if reader.byte() != _LISTED:
            return FAILURE
        blobs = []
        for _ in range(min(reader.u32(), _MAX_KEYS)):
            blobs.append(reader.string())
            reader.string()
        have = {ssh_keys.fingerprint(blob): blob for blob in blobs}
        shown = {grant.key: grant.credential for grant in self._visible() if grant.key in have}
        entries = (string(have[key]) + string(name.encode()) for key, name in shown.items())
        return bytes([_LISTED]) + len(shown).to_bytes(4, "big") + b"".join(entries)

    def _visible(self) -> list[Grant]:
        """Return the grants to list. Keys that sign commits come first: git takes the first one by default."""
        if self._bind_seen:
            places = self._bound.places if self._bound else frozenset()
            return [grant for grant in self._ring.grants if grant.places & places]
        return sorted(self._ring.grants, key=lambda grant: not grant.git)


def _signed(message: bytes) -> bytes:
    """Return the agent's answer if it is a signature.

    Raises:
        WireError: it is malformed.
    """
    reader = Reader(message)
    if reader.byte() != _SIGNED:
        return FAILURE
    reader.string()
    reader.end()
    return message


def _failed(
    event: SigningEvent, reason: str = "agent-refused", explanation: str = "", remedy: str = ""
) -> SigningEvent:
    """Return the event of a signature that was allowed and did not come."""
    return SigningEvent(
        "failed", reason, use=event.use, key=event.key, credential=event.credential, host=event.host,
        user=event.user, namespace=event.namespace,
        explanation=explanation or "the person's ssh-agent did not sign: it lacks the key, or nobody confirmed",
        remedy=remedy or "ssh-add -l outside of the sandbox",
    )  # fmt: skip
