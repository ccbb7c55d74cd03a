"""known_hosts, read: which keys a host may show (sshd(8), SSH_KNOWN_HOSTS FILE FORMAT).

Plain names, patterns, negated patterns, hashed names, `[host]:port`, `@revoked` and
`@cert-authority`. A line that cannot be read grants nothing; one that revokes must be readable,
else no answer is given. Stricter than ssh(1) in one point: a key known for a host's port 22 is
not one for its other ports. Reading the files is for `runs`.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import hashlib
import hmac
import re
from collections.abc import Iterable
from typing import NamedTuple

from cloister.credentials import ssh_keys
from cloister.credentials.ssh_wire import WireError

SSH_PORT = 22
_HASHED = "|1|"
_MAX_PATTERN = 512


class Place(NamedTuple):
    """A host and a port that may be logged in to."""

    host: str
    port: int = SSH_PORT

    @property
    def name(self) -> str:
        """The spelling of known_hosts: the port only where it is not 22."""
        return self.host if self.port == SSH_PORT else f"[{self.host}]:{self.port}"

    @property
    def text(self) -> str:
        """The spelling of a policy."""
        return self.host if self.port == SSH_PORT else f"{self.host}:{self.port}"


class HostKeys(NamedTuple):
    """What is known of one place."""

    keys: frozenset[bytes] = frozenset()
    authorities: frozenset[bytes] = frozenset()
    """Keys that sign this host's certificates."""

    def lines(self, place: Place) -> list[str]:
        """Return the lines of a known_hosts file that knows this place and no other."""
        plain = [f"{place.name} {ssh_keys.write_public(blob)}" for blob in sorted(self.keys)]
        return plain + [
            f"@cert-authority {place.name} {ssh_keys.write_public(blob)}" for blob in sorted(self.authorities)
        ]


class KnownHostsError(ValueError):
    """A line that takes a key back cannot be read."""


class _Line(NamedTuple):
    marker: str
    names: str
    blob: bytes


class KnownHosts:
    """The files of one user, ready to be asked."""

    def __init__(self, texts: Iterable[str]) -> None:
        """Read the texts of all files.

        Raises:
            KnownHostsError: a `@revoked` line cannot be read.
        """
        self._lines: list[_Line] = []
        self.revoked: frozenset[bytes] = frozenset()
        for text in texts:
            for line in text.splitlines():
                if (parsed := _parse(line)) is not None:
                    self._lines.append(parsed)
        self.revoked = frozenset(line.blob for line in self._lines if line.marker == "@revoked")

    def about(self, place: Place) -> HostKeys:
        """Return the keys a place may show. A key that was taken back anywhere is none."""
        found: dict[str, set[bytes]] = {"": set(), "@cert-authority": set()}
        for line in self._lines:
            if line.marker in found and line.blob not in self.revoked and _matches(line.names, place.name):
                found[line.marker].add(line.blob)
        return HostKeys(frozenset(found[""]), frozenset(found["@cert-authority"]))


def _parse(line: str) -> _Line | None:
    """Return a line's parts, or None for what says nothing."""
    words = line.split()
    if not words or words[0].startswith("#"):
        return None
    marker = words.pop(0) if words[0].startswith("@") else ""
    try:
        blob = ssh_keys.parse_public(" ".join(words[1:3]))
    except WireError as error:
        if marker == "@revoked":
            raise KnownHostsError(f"a @revoked line of known_hosts cannot be read: {error}") from None
        return None
    return _Line(marker, words[0], blob)


def _matches(names: str, name: str) -> bool:
    """Say whether the first field of a line is about a name; one negated pattern that fits is enough for no."""
    if names.startswith(_HASHED):
        return _hashed(names, name)
    matched = False
    for pattern in names.split(","):
        negated = pattern.startswith("!")
        if fits(pattern.removeprefix("!").lower(), name.lower()):
            if negated:
                return False
            matched = True
    return matched


def fits(pattern: str, name: str) -> bool:
    """Match a name with `*` and `?` only: brackets stand for themselves, they enclose a host in front of a port."""
    if len(pattern) > _MAX_PATTERN:
        return False
    return re.fullmatch(fnmatch.translate(pattern.replace("[", "[[]")), name) is not None


def _hashed(names: str, name: str) -> bool:
    """Compare with `|1|salt|hash`: HMAC-SHA-1 of the name under the salt, which `ssh-keygen -H` writes."""
    salt, bar, digest = names.removeprefix(_HASHED).partition("|")
    try:
        key, wanted = base64.b64decode(salt, validate=True), base64.b64decode(digest, validate=True)
    except (binascii.Error, ValueError):
        return False
    return bool(bar) and hmac.compare_digest(hmac.new(key, name.encode(), hashlib.sha1).digest(), wanted)
