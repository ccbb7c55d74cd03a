"""The keys of providers: read by their references when they are needed, a login's access token among them.

A login goes to its own hosts and to no other, whatever address a provider has: asked anew with each reading, since
another login may get the same name while runs live. Nothing is kept here; `host/secrets.py` says what is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

from cloister.errors import CloisterError, PolicyError, Problem, RetryError
from cloister.host.owner import Owner
from cloister.host.secrets import Provider as ReadSecret
from cloister.host.secrets import SecretReader, Surroundings
from cloister.llm.upstreams import Upstream, compile_upstream, key_field
from cloister.policy.model import Provider
from cloister.runs.login_files import Describe, describer, login_of
from cloister.runs.paths import Paths

_UNAVAILABLE = "secret-unavailable"


class LoginOwner(Protocol):
    """Who has the tokens of logins (`login_secrets.LoginSecrets`)."""

    @property
    def read(self) -> ReadSecret:
        """Return an access token of a login that is good now."""
        ...

    def refused(self, name: str) -> None:
        """A host did not accept the token that was given out last."""
        ...


class Opened(NamedTuple):
    """A provider's table, ready for use."""

    upstream: Upstream
    key: ProviderKey | None


class ProviderKey:
    """The key of one provider, by its secret reference."""

    def __init__(self, keys: ProviderKeys, name: str, provider: Provider, upstream: Upstream) -> None:
        """Read nothing yet."""
        self._keys, self._name, self._provider, self._upstream = keys, name, provider, upstream

    async def read(self) -> str:
        """Return the key as it is now.

        Raises:
            CloisterError: it cannot be had, or is a login that is not for this provider's host.
        """
        self._keys.refuse_host(self._name, self._provider, self._upstream)
        value = await self._keys.reader.read(self._provider.key)
        return value.decode("utf-8", "replace").strip()

    def rejected(self) -> None:
        """Forget what was kept of it; a login is renewed."""
        self._keys.reader.refused(self._provider.key)

    async def check(self) -> None:
        """Read it once, so that a run is not begun whose models would not answer.

        Raises:
            CloisterError: as `read`, in words for whoever starts a run.
        """
        try:
            key = await self.read()
            key_field(self._upstream, key)
        except ValueError as error:
            raise self._unavailable(str(error), "write the key alone into it, on one line") from None
        except RetryError as error:
            if error.reference != _UNAVAILABLE:
                raise
            raise self._unavailable(error.message.removeprefix("a secret cannot be had: "), error.remedy) from None

    def _unavailable(self, why: str, remedy: str) -> RetryError:
        if self._provider.key.startswith("env:"):
            why = f"the broker, which all runs share, has no variable {self._provider.key.removeprefix('env:')}"
            remedy = "keep it where the broker reads it: file:, keyring:, pass:, command: or systemd:"
        message = f"the key of the provider {self._name!r} cannot be had: {why}"
        return RetryError(_UNAVAILABLE, message, where=f".providers.{self._name}.key: {self._provider.key}",
                          remedy=remedy)  # fmt: skip


class ProviderKeys:
    """How one process reads the keys of providers: its own environment counts, and no run's."""

    def __init__(self, paths: Paths, owner: Owner, environment: Mapping[str, str], logins: LoginOwner) -> None:
        """Read nothing yet."""
        self.reader = SecretReader(
            Surroundings(paths.home, owner.uid, own=environment),
            providers={"login": logins.read}, refusals={"login": logins.refused},
        )  # fmt: skip
        self.describe = describer(paths.logins)

    def login_headers(self, provider: Provider) -> dict[str, str]:
        """Return the fields that requests with a login need; none for other keys.

        Raises:
            CloisterError: there is no such login, or its file cannot be trusted.
        """
        login = login_of(provider.key)
        return self.describe(login).headers if login else {}

    def open(self, name: str, provider: Provider, login_headers: Mapping[str, str]) -> Opened:
        """Return a provider's upstream and key.

        Raises:
            CloisterError: its key is a login that is unknown, or for other hosts.
        """
        upstream = compile_upstream(name, provider, login_headers)
        self.refuse_host(name, provider, upstream)
        return Opened(upstream, ProviderKey(self, name, provider, upstream) if provider.key else None)

    def refuse_host(self, name: str, provider: Provider, upstream: Upstream) -> None:
        """Refuse to send a login's token to a host that it is not for.

        Raises:
            PolicyError: `login-host`.
            CloisterError: there is no such login.
        """
        login = login_of(provider.key)
        if not login:
            return
        refuse_login_host(login, self.describe(login).hosts, name, upstream.host)


def refuse_login_host(login: str, hosts: tuple[str, ...], name: str, host: str) -> None:
    """Refuse a provider whose host is none of a login's.

    Raises:
        PolicyError: `login-host`.
    """
    if host.lower().rstrip(".") not in hosts:
        where = f".providers.{name}.base_url"
        problem = Problem(f"the login {login!r} is not for {host}", where, f"one of {', '.join(hosts)}")
        raise PolicyError([problem], reference="login-host")


def login_warnings(providers: Mapping[str, Provider], describe: Describe) -> Iterator[tuple[str, str, str]]:
    """Yield what `check` says of providers' logins: the provider, what, and what to do."""
    for name, provider in providers.items():
        if not (login := login_of(provider.key)):
            continue
        try:
            found = describe(login)
            refuse_login_host(login, found.hosts, name, compile_upstream(name, provider).host)
        except CloisterError as error:
            yield name, f"agents with the provider {name!r} will not start: {error.message}", error.remedy
        else:
            if found.state == "ended":
                what = f"agents with the provider {name!r} will not start: the login {login!r} has ended"
                yield name, what, f"cloister login {login}"
