"""The credentials of one run: what the relay asks before a request leaves, and the only holder of its placeholders.

Implements `relay.session.Broker`. Secrets are read when a request needs them and forgotten when
it has left. Placeholders live in this object and in the agent's environment, and mean nothing
to any other run or after the end. What a request may carry is decided in `credentials/`.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping

import msgspec

from cloister.credentials import inject, sigv4
from cloister.credentials.bindings import Binding, InjectionError, Request, bind
from cloister.credentials.placeholders import NONE, Placeholders
from cloister.egress.decision import Target, Verdict
from cloister.egress.events import EgressEvent
from cloister.egress.http1 import Headers
from cloister.egress.paths import PathError, PathPattern
from cloister.egress.rules import Rule
from cloister.errors import CloisterError, RetryError
from cloister.host.secrets import SecretReader
from cloister.policy.model import Credential, Injection
from cloister.policy.variables import variables
from cloister.relay.session import RefusedError, Swap
from cloister.runs.authority import Trusted

_UNAUTHORIZED = 401
_ECHOING = frozenset({"TRACE", "TRACK"})
"""Methods whose answer is the request itself (RFC 9110, section 9.3.8): no secret goes with them."""
Note = Callable[[str, dict[str, object]], None]
"""Writes one event of the run."""


class RunCredentials:
    """What one run may use, from its start to its end."""

    def __init__(
        self,
        credentials: Mapping[str, Credential],
        reader: SecretReader,
        trusted: Trusted | None,
        owned: frozenset[tuple[str, int, str]] = frozenset(),
        former: Mapping[str, tuple[str, ...]] = NONE,
    ) -> None:
        """Make placeholders; read no secret.

        Args:
            credentials: of the policy.
            reader: of their references.
            trusted: there when anything is to be injected.
            owned: host, port and path of token endpoints of logins, where only the broker asks.
            former: placeholders of the run whose processes go on in this one.
        """
        self._owned = owned
        self._reader = reader
        self._trusted = trusted
        kinds = {name: one.inject.scheme if one.inject else "header" for name, one in credentials.items() if one.secret}
        self.placeholders = Placeholders(kinds, former=former)
        self.environment: dict[str, str] = {}
        """Variables of the agent, with placeholders in them."""
        for name in kinds:
            self._show(name, credentials[name])
        self.used: dict[tuple[str, str], int] = {}
        """Requests by the credential's name and the place they went to."""
        self._note: Note = lambda _kind, _fields: None
        self._told: set[tuple[str, str]] = set()
        self._shown: set[str] = set()
        """Credentials whose placeholder was seen in a body for their own host."""
        self._places: set[tuple[str, int]] = {(host, port) for host, port, _ in owned}
        self._bindings: dict[str, Binding] = {}
        self._references: dict[str, str] = {}
        self._open = True
        self.update(credentials)

    @property
    def certificate_pem(self) -> bytes:
        """What the sandbox has to trust."""
        return self._trusted.certificate if self._trusted else b""

    @property
    def for_apply(self) -> tuple[bytes, dict[str, str]]:
        """What applying the plan needs and the plan does not hold: our certificate, and what stands for each secret."""
        return self.certificate_pem, {name: self.placeholders[name].token for name in self.placeholders.names()}

    def record_with(self, note: Note) -> None:
        """Take the run's log, once there is one."""
        self._note = note

    async def check(self) -> None:
        """Read every secret once, so that a run whose secrets cannot be had does not start.

        Raises:
            CloisterError: names the first, and what to do.
        """
        for name, binding in self._bindings.items():
            secret = await self._reader.read(self._references[name])
            try:
                inject.masks(binding, secret)
            except InjectionError as error:
                where = self._references[name]
                raise RetryError(error.reason, error.explanation, where=where, remedy=error.remedy) from None

    def update(self, credentials: Mapping[str, Credential]) -> tuple[str, ...]:
        """Obey the policy as it is now; return the names of what is revoked by that, or bound in another way.

        A credential that the run did not have at its start stays unknown to it: its environment is fixed.
        """
        before = self._bindings
        self._bindings, self._references = {}, {}
        for name in self.placeholders.names():
            credential = credentials.get(name)
            bound = bind(name, credential, _limits(credential.inject)) if credential and credential.inject else None
            if credential and bound and self._trusted:  # without an authority, the sandbox trusts none
                self._bindings[name] = bound
                self._references[name] = credential.secret
                self._places |= {(host, bound.port) for host in bound.hosts}
        return tuple(name for name, was in before.items() if not _same(was, self._bindings.get(name)))

    def note(self, event: EgressEvent) -> EgressEvent:
        """Count what a request used; a host that says 401 has the secret asked for anew. Returns it for the record."""
        for name in event.credentials:
            key = (name, f"{event.host}:{event.port}")
            self.used[key] = self.used.get(key, 0) + 1
            if event.status == _UNAUTHORIZED and name in self._references:
                self._reader.refused(self._references[name])
        path = event.path
        for name in self.placeholders.names() if "cloister-" in path else ():
            for token in (self.placeholders[name].token, *self.placeholders[name].former):
                path = path.replace(token, f"{{{name}}}")
        return event if path == event.path else msgspec.structs.replace(event, path=path)

    def summary(self) -> tuple[str, ...]:
        """Return for the receipt which credential was used how often and where."""
        words = [f"{name}: {count} requests to {place}" for (name, place), count in sorted(self.used.items())]
        used = {name for name, _ in self.used}
        return (*words, *(f"{name}: not used" for name in sorted(set(self.placeholders.names()) - used)))

    def close(self) -> None:
        """Make every placeholder worthless: the run is over."""
        self._open = False
        self._reader.forget()

    # relay.session.Broker

    def terminates(self, host: str, port: int) -> bool:
        """Say whether TLS to this place ends here. A place that was ever bound stays so while the run lasts."""
        return (host, port) in self._places

    def certificate(self, host: str) -> ssl.SSLContext:
        """Return a server's context for a bound host."""
        assert self._trusted is not None  # noqa: S101  # a place is bound, so there is an authority
        return self._trusted.authority.context(host)

    def body_needed(self, target: Target, headers: Headers) -> int:
        """Return how many bytes of body have to be seen first: those of AWS requests that do not say their hash."""
        request = Request(target.method, target.path, headers)
        signed = [one for one in self._bound(target) if one.scheme == "sigv4"]
        needed = any(inject.find(one, self.placeholders[one.name], request) == "placeholder" for one in signed)
        return sigv4.body_needed(headers) if needed else 0

    async def swap(self, target: Target, headers: Headers, body: bytes = b"") -> Swap:
        """Put real secrets in.

        Raises:
            RefusedError: see `relay.session.Broker.swap`.
        """
        if not self._open:
            raise _refused("run-ended", "the run is over, and its placeholders with it")
        if (*target.place, target.path.partition("?")[0]) in self._owned:
            why = "the broker renews this login outside the sandbox; nothing in here has to, or can"
            raise _refused("login-owned-by-broker", why, "tell the user to run `cloister login` outside")
        request = Request(target.method, target.path, headers, body, _host_field(target, headers))
        self._refuse_revoked(request)
        used: list[str] = []
        masks: list[bytes] = []
        for binding in self._wanted(target, request):
            try:
                secret = await self._reader.read(self._references[binding.name])
                request = inject.put(binding, secret, request, self.placeholders[binding.name])
                masks += inject.masks(binding, secret) if binding.mask else ()
            except CloisterError as error:
                raise self._unavailable(binding, error.message) from None
            except InjectionError as error:
                raise _refused(error.reason, error.explanation, error.remedy, binding.name) from None
            used.append(binding.name)
        return Swap(request.path, request.headers, tuple(dict.fromkeys(masks)), tuple(used))

    def leaks(self, data: bytes, place: tuple[str, int] | None = None) -> bool:
        """Say whether bytes hold a placeholder that must not go there; record the first one of each that may."""
        bound = frozenset(one.name for one in self._at(*place)) if place else frozenset()
        if place is None or not bound:
            return self.placeholders.leaks(data)
        wanted = [name for name in self.placeholders.names() if name not in bound or name not in self._shown]
        found = self.placeholders.names_in(data, wanted)
        if found - bound:
            return True
        for name in found:
            self._shown.add(name)
            self._note("placeholder-in-body", {"name": name, "place": f"{place[0]}:{place[1]}"})
        return False

    @property
    def overlap(self) -> int:
        """How many bytes of a chunk belong to the search in the next one."""
        return self.placeholders.overlap

    # Inside.

    def _bound(self, target: Target) -> list[Binding]:
        return self._at(*target.place)

    def _at(self, host: str, port: int) -> list[Binding]:
        return [one for one in self._bindings.values() if one.port == port and host in one.hosts]

    def _wanted(self, target: Target, request: Request) -> list[Binding]:
        """Return what is put into a request: what it names by a placeholder, and what is put in by itself.

        Raises:
            RefusedError: it names a credential that is not for it.
        """
        wanted: list[Binding] = []
        free: list[Binding] = []
        taken: set[str] = set()
        for binding in self._bound(target):
            found = inject.find(binding, self.placeholders[binding.name], request)
            fits = request.method not in _ECHOING and binding.covers(request.method, request.path)
            if found == "placeholder":
                if not fits:
                    why = "the credential is limited to other methods or paths"
                    remedy = f"add them to methods or paths of the credential {binding.name}, if it shall have them"
                    raise _refused("credential-not-for-this-request", why, remedy, name=binding.name)
                wanted.append(binding)
                taken.add(binding.place)
            elif found == "own":
                self._tell(binding.name, target)
                taken.add(binding.place)
            elif binding.always and fits:
                free.append(binding)
        for binding in free:
            if binding.place not in taken:
                wanted.append(binding)
                taken.add(binding.place)
        return wanted

    def _refuse_revoked(self, request: Request) -> None:
        """Refuse a placeholder that the policy gave up: it shall fail at once, and say why."""
        for name in self.placeholders.names():
            if name in self._bindings:
                continue
            one = self.placeholders[name]
            if any(one.stands_in(value) for value in (request.path.encode(), *(value for _, value in request.headers))):
                why = f"the credential {name!r} was taken back while the run lasts"
                raise _refused("credential-revoked", why, name=name)

    def _show(self, name: str, credential: Credential) -> None:
        one = self.placeholders[name]
        values = (one.key_id, one.token) if one.key_id else (one.token,)
        self.environment |= dict(zip(variables(credential), values, strict=False))

    def _tell(self, name: str, target: Target) -> None:
        """Record once per place that the agent sends a value of its own."""
        key = (name, target.authority)
        if key not in self._told:
            self._told.add(key)
            self._note("credential", {"name": name, "place": target.authority, "what": "own-value"})

    def _unavailable(self, binding: Binding, why: str) -> RefusedError:
        """Refuse for want of a secret: the agent learns that, the person also why."""
        self._note("credential", {"name": binding.name, "what": "secret-unavailable", "why": why})
        text = f"the secret of the credential {binding.name!r} cannot be had at the moment"
        return _refused(
            "secret-unavailable", text, "tell the user, who finds the reason in `cloister logs`", binding.name
        )


def _limits(inject_: Injection | None) -> Callable[[str, str], bool]:
    """Return whether a secret may go with a method and path; an ambiguous path is none it may go with."""
    if inject_ is None or not (inject_.methods or inject_.paths):
        return lambda _method, _path: True
    rule = Rule("", "", None, frozenset(inject_.methods), tuple(PathPattern(path) for path in inject_.paths))

    def covers(method: str, path: str) -> bool:
        try:
            return rule.covers(method, path)
        except PathError:
            return False

    return covers


def _same(one: Binding, other: Binding | None) -> bool:
    return other is not None and one._replace(covers=other.covers) == other


def _host_field(target: Target, headers: Headers) -> str:
    """Return what the server will see as Host, which signatures cover."""
    field = next((value.decode("latin-1") for name, value in headers if name.lower() == b"host"), "")
    return field or (target.host.text if target.port == 443 else target.authority)  # noqa: PLR2004  # https


def _refused(reason: str, explanation: str, remedy: str = "", name: str = "") -> RefusedError:
    return RefusedError(Verdict("deny", reason, f"credentials.{name}" if name else "", explanation, remedy))
