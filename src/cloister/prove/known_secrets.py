"""The agent's real secrets, read on the host only to be looked for in what came out of the sandbox.

They are read by the references of the policy, in the process of `cloister prove`; nothing of
them is sent inside, printed or kept. What is found is told by name. A secret is looked for as
it is, in base64 at any offset, percent-encoded, in hexadecimal and backwards.
"""

from __future__ import annotations

import asyncio
import base64
import os
import re
from collections.abc import Iterable, Iterator
from urllib.parse import quote

from cloister.errors import CloisterError
from cloister.host.logins import Shelf
from cloister.host.secrets import SecretReader, Surroundings
from cloister.policy.merge import ResolvedAgent
from cloister.prove.place import Place
from cloister.runs.login_files import load, login_of

SHORTEST = 8
"""Bytes. Shorter words stand in many places by chance, so they are not looked for."""
_PART = 24
"""Bytes from which a part of a secret of several parts (AWS pairs, key files) is looked for by itself."""
_BETWEEN = re.compile(rb'[\s":=,{}]+|\\n')
_PRIVATE = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----(.+?)-----END", re.DOTALL)


class KnownSecrets:
    """Secrets by name. Its `repr` shows nothing of them."""

    def __init__(self) -> None:
        """Know none."""
        self._needles: dict[str, tuple[bytes, ...]] = {}
        self.unread: list[str] = []
        """Names of those that could not be read, or are too short to look for."""

    def __repr__(self) -> str:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        return f"KnownSecrets({', '.join(self._needles)})"

    def add(self, name: str, value: bytes) -> None:
        """Look for a secret, and for each of its long parts."""
        parts = [part for part in _BETWEEN.split(value) if len(part) >= _PART and b"://" not in part]
        needles = [needle for one in (value.strip(), *parts) if len(one) >= SHORTEST for needle in spellings(one)]
        if needles:
            self._needles[name] = tuple(dict.fromkeys(needles))
        else:
            self.unread.append(name)

    def found_in(self, data: bytes) -> list[str]:
        """Return which secrets stand in some bytes."""
        found = (name for name, needles in self._needles.items() if any(needle in data for needle in needles))
        return [f"real secret read: {name}" for name in found]

    def masked(self, text: str) -> str:
        """Return a text with stars where a secret stands in it: a report of a breach must not be one."""
        data = text.encode("utf-8", "surrogateescape")
        for needle in sorted((one for all_ in self._needles.values() for one in all_), key=len, reverse=True):
            data = data.replace(needle, b"*" * 8)
        return data.decode("utf-8", "surrogateescape")


def spellings(secret: bytes) -> Iterator[bytes]:
    """Yield a secret as it could be written."""
    yield secret
    yield secret[::-1]
    yield secret.hex().encode()
    yield quote(secret, safe="").encode()
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + secret).rstrip(b"=")
        inner = encoded[-(-before * 8 // 6) : (before + len(secret)) * 8 // 6]
        yield inner
        yield inner.replace(b"+", b"-").replace(b"/", b"_")


def read(place: Place) -> KnownSecrets:
    """Read what the agent's policy refers to, and the keys that the battery's own broker made.

    What a unit's policy refers to is the system's: a person cannot read it, and runs no command of root's for it.
    """
    known = KnownSecrets()
    if place.unit:
        known.unread = [name for name, _ in named(place.resolved)]
        return known
    asyncio.run(_references(known, place))
    for login in _logins(place.resolved):
        try:
            kept = load(Shelf(place.user_paths.logins), login)
        except CloisterError:
            known.unread.append(f"login {login}")
            continue
        for name in ("access_token", "refresh_token"):
            if value := str(getattr(kept, name)):
                known.add(f"{name.replace('_', ' ')} of {login}", value.encode())
    state = place.paths.state
    for private in _PRIVATE.findall(_file(f"{state}/authority/authority.pem")):
        known.add("key of the authority", bytes(private))
    if master := _file(f"{state}/identity/master.key"):
        known.add("master key of identities", master)
    return known


async def _references(known: KnownSecrets, place: Place) -> None:
    around = Surroundings(place.home, place.owner.uid, environment=place.environment, own=os.environ)
    reader = SecretReader(around)
    for name, reference in named(place.resolved):
        if reference.startswith("login:"):
            continue
        try:
            known.add(name, await reader.read(reference))
        except CloisterError:
            known.unread.append(name)


def named(resolved: ResolvedAgent) -> Iterator[tuple[str, str]]:
    """Yield the references of an agent's credentials and providers, each with a name."""
    for name, credential in resolved.agent.credentials.items():
        if credential.secret:
            yield f"credential {name}", credential.secret
    for name in resolved.agent.llm.providers:
        provider = resolved.policy.providers.get(name)
        if provider is not None and provider.key:
            yield f"key of provider {name}", provider.key


def _logins(resolved: ResolvedAgent) -> Iterable[str]:
    return dict.fromkeys(login for _, reference in named(resolved) if (login := login_of(reference)))


def _file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(1 << 20)
    except OSError:
        return b""
