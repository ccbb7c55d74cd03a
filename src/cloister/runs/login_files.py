"""Logins as runs meet them: which hosts they are for, and the file in which a product finds placeholders.

Reads the store and never asks a provider, so that preparing a run costs a read and no TLS library is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import msgspec

from cloister.credentials import logins as kept_logins
from cloister.credentials.bindings import hosts_of
from cloister.credentials.logins import Description, Kept
from cloister.credentials.products import placeholder_file
from cloister.errors import CloisterError, PolicyError, Problem, StepError
from cloister.host.logins import Shelf
from cloister.policy.model import Agent
from cloister.policy.variables import variables
from cloister.runs.compile_parts import PlacedFile

SCHEME = "login:"
Describe = Callable[[str], Description]


def load(shelf: Shelf, name: str) -> Kept:
    """Return a login.

    Raises:
        UsageError: there is none of that name (`login-unknown`).
        CloisterError: its file cannot be trusted or understood.
    """
    return understood(shelf.read(name), name)


def understood(data: bytes, name: str) -> Kept:
    """Return the login of a file's content; raises like `load`."""
    kept = kept_logins.decode(data)
    if kept is None or kept.name != name:
        message = f"the file of the login {name!r} is not one that this version wrote"
        raise StepError("login-unreadable", message, remedy=f"cloister login {name}")
    return kept


def describer(directory: str) -> Describe:
    """Return what tells about logins in a directory, as they are now."""
    shelf = Shelf(directory)
    return lambda name: kept_logins.describe(load(shelf, name), time.time())


def login_of(secret: str) -> str:
    """Return the login that a reference names, or nothing."""
    return secret.removeprefix(SCHEME) if secret.startswith(SCHEME) else ""


def warnings(agent: Agent, name: str, describe: Describe) -> Iterator[tuple[str, str, str]]:
    """Yield what `check` says of an agent's logins: the credential, what, and what to do."""
    for key, credential in agent.credentials.items():
        if not (login := login_of(credential.secret)):
            continue
        try:
            found = describe(login)
            refuse_hosts(msgspec.structs.replace(agent, credentials={key: credential}), name, describe)
        except CloisterError as error:
            remedy = error.remedy or "use it for its own hosts only"
            yield key, f"the agent {name!r} will not start: {error.message}", remedy
        else:
            if found.state == "ended":
                yield (
                    key,
                    f"the agent {name!r} will not start: the login {login!r} has ended",
                    f"cloister login {login}",
                )


def refuse_hosts(agent: Agent, name: str, describe: Describe) -> None:
    """Refuse a policy that would send a login's token to a host it is not for.

    Raises:
        PolicyError: `login-host`, with every such host.
        CloisterError: there is no such login.
    """
    problems = []
    for key, credential in agent.credentials.items():
        login = login_of(credential.secret)
        if not login or credential.inject is None:
            continue
        meant = describe(login).hosts
        where = f".agents.{name}.credentials.{key}.inject.host"
        problems += [
            Problem(f"the login {login!r} is not for {host}", where, f"one of {', '.join(meant)}")
            for host in hosts_of(credential.inject)
            if host.lower().rstrip(".") not in meant
        ]
    if problems:
        raise PolicyError(problems, reference="login-host")


def placed_files(agent: Agent, describe: Describe) -> Iterator[PlacedFile]:
    """Yield the login files of products whose credential has no variable; `{placeholder}` stands in their text.

    Raises:
        CloisterError: there is no such login.
    """
    for key, credential in agent.credentials.items():
        login = login_of(credential.secret)
        if not login or variables(credential):
            continue
        found = describe(login)
        if found.product:
            text = placeholder_file(found.product, "{placeholder}", found.details, found.scopes)
            yield PlacedFile(found.product_file, text, key)


def token_places(agent: Agent, describe: Describe) -> frozenset[tuple[str, int, str]]:
    """Return host, port and path of the token endpoints of an agent's logins: only the broker asks there."""
    found = set()
    for credential in agent.credentials.values():
        if login := login_of(credential.secret):
            parts = urlsplit(describe(login).token_url)
            if parts.scheme == "https":
                found.add((parts.hostname or "", parts.port or 443, parts.path or "/"))
    return frozenset(found)
