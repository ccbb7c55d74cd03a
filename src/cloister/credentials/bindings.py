"""What a credential of the policy means for a request: to which places it goes, where it is put, when it counts.

A `Binding` is the compiled form of `[agents.NAME.credentials.NAME]`. It holds no secret. How
each scheme changes a request is for `inject`; which paths and methods are meant is asked of a
function, since path patterns belong to the egress room.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from cloister.policy.model import Credential, Injection
from cloister.policy.variables import variables

Scheme = Literal["header", "bearer", "basic", "query", "path", "sigv4", "git", "npm", "pip"]
Headers = list[tuple[bytes, bytes]]

USERS = {"git": "x-access-token", "pip": "__token__"}
"""User names that the tools' hosts expect beside a token: GitHub and GitLab take any name, package indexes this one."""
_WORDS = {
    "header": "header {header}", "bearer": "Authorization: Bearer", "basic": "Authorization: Basic",
    "query": "query parameter {query}", "path": "segment {value} of the path", "sigv4": "AWS signature",
    "git": "Authorization: Basic, for git", "npm": "Authorization: Bearer, for npm",
    "pip": "Authorization: Basic, for pip",
}  # fmt: skip


class InjectionError(Exception):
    """A request that must not leave with this secret. `reason` is kebab-case; the texts are for people."""

    def __init__(self, reason: str, explanation: str, remedy: str = "") -> None:
        """Keep the three parts; none of them holds anything of a secret."""
        super().__init__(explanation)
        self.reason = reason
        self.explanation = explanation
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Request:
    """What of a request matters here. Shown without its contents: after an injection they hold secrets."""

    method: str
    path: str = field(repr=False)
    """The origin-form target, query included."""
    headers: Headers = field(repr=False)
    body: bytes = field(default=b"", repr=False)
    host: str = ""
    """The host, with its port where that is not 443, as it stands in the Host field."""


class Binding(NamedTuple):
    """One credential, ready to be held against requests."""

    name: str
    scheme: Scheme
    hosts: frozenset[str]
    port: int
    header: str = ""
    query: str = ""
    value: str = "{secret}"
    user: str = ""
    always: bool = False
    """The agent has no variable for it, or its tool sends none by itself: put in where nothing was sent."""
    mask: bool = False
    covers: Callable[[str, str], bool] = lambda _method, _path: True
    """Says whether the secret may go with a method and a path."""

    @property
    def place(self) -> str:
        """Where in a request it goes: two bindings with one place at one host would get in each other's way."""
        if self.scheme == "query":
            return f"?{self.query}"
        if self.scheme == "path":
            return f"/{self.value}"
        return self.header.lower() if self.scheme == "header" else "authorization"


def bind(name: str, credential: Credential, covers: Callable[[str, str], bool]) -> Binding | None:
    """Return the binding of a credential, or None where nothing is to be injected (keys of an agent)."""
    inject = credential.inject
    if inject is None:
        return None
    return Binding(
        name=name,
        scheme=inject.scheme,
        hosts=frozenset(hosts_of(inject)),
        port=inject.port,
        header=inject.header,
        query=inject.query,
        value=inject.value,
        user=inject.user or USERS.get(inject.scheme, ""),
        # A path is the client's: what is not in it cannot be put in.
        always=inject.scheme in {"git", "npm", "pip"} or (inject.scheme != "path" and not variables(credential)),
        mask=credential.mask,
        covers=covers,
    )


def hosts_of(inject: Injection) -> tuple[str, ...]:
    """Return the hosts a secret is bound to."""
    return (inject.host,) if isinstance(inject.host, str) else inject.host


def words(inject: Injection) -> str:
    """Say in words how a secret travels."""
    return _WORDS[inject.scheme].format(header=inject.header, query=inject.query, value=inject.value)
