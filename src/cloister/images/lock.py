"""The lock of an image: its packages with version and SHA-256, and the tools that wrote it. Pure.

It names no mirror. Two builds whose locks are equal are equal bit for bit; a build that must repeat an older one is
held against that one's lock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec

Kind = Literal["deb", "kernel", "npm", "pip"]


class Package(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, order=True):
    """One package."""

    kind: Kind
    name: str
    version: str
    arch: str = ""
    sha256: str = ""
    """Of the archive it came in, in hex; npm's is SHA-512 in base64 behind `sha512-`, as npm has it."""


class Lock(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of them."""

    schema: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1
    name: str
    suite: str
    packages: tuple[Package, ...]
    tools: dict[str, str] = msgspec.field(default_factory=dict)
    """Programs whose version decides about bits, such as mkfs.erofs."""

    def encoded(self) -> bytes:
        """Return the file."""
        return msgspec.json.format(msgspec.json.encode(self, order="sorted"), indent=1) + b"\n"

    def digest(self) -> str:
        """Return the SHA-256 that the manifest has."""
        return hashlib.sha256(self.encoded()).hexdigest()


def decode(data: bytes) -> Lock:
    """Return the lock of a file.

    Raises:
        ValueError: it is none.
    """
    return msgspec.json.decode(data, type=Lock)


def from_debian(installed: str, records: str, *, kind: Kind = "deb") -> list[Package]:
    """Return packages from dpkg's list and apt's records of them.

    Args:
        installed: lines `name:arch=version`.
        records: paragraphs as apt-cache(8) `show` prints them; others than the installed ones do not count.
        kind: what they are.

    Raises:
        ValueError: of a package there is no record, and so no digest.
    """
    digests = {}
    for fields in _paragraphs(records):
        key = (fields.get("Package", ""), fields.get("Architecture", ""), fields.get("Version", ""))
        digests[key] = fields.get("SHA256", "")
    found: list[Package] = []
    for line in installed.splitlines():
        name, _, version = line.partition("=")
        name, _, arch = name.partition(":")
        digest = digests.get((name, arch, version), "")
        if not digest:
            raise ValueError(f"apt knows no digest of {line}")
        found.append(Package(kind=kind, name=name, version=version, arch=arch, sha256=digest))
    return sorted(found)


def kernel_package(record: str) -> Package:
    """Return the package of the kernel from its record.

    Raises:
        ValueError: it is incomplete.
    """
    fields = next(iter(_paragraphs(record)), {})
    line = f"{fields.get('Package', '')}:{fields.get('Architecture', '')}={fields.get('Version', '')}"
    return from_debian(line, record, kind="kernel")[0]


def differences(ours: Lock, theirs: Lock) -> list[str]:
    """Return one line for each package or tool that is not the same."""
    lines: list[str] = []
    have = {(each.kind, each.name, each.arch): each for each in ours.packages}
    want = {(each.kind, each.name, each.arch): each for each in theirs.packages}
    for key in sorted(have.keys() | want.keys()):
        a, b = have.get(key), want.get(key)
        if a is None and b is not None:
            lines.append(f"{b.name} {b.version} is missing")
        elif b is None and a is not None:
            lines.append(f"{a.name} {a.version} is not in the lock")
        elif a != b and a is not None and b is not None:
            what = f"{b.version}" if a.version != b.version else "another content of the same version"
            lines.append(f"{a.name} {a.version}, and the lock has {what}")
    for name in sorted(ours.tools.keys() | theirs.tools.keys()):
        mine, locked = ours.tools.get(name, "none"), theirs.tools.get(name, "none")
        if mine != locked:
            lines.append(f"{name} {mine}, and the lock has {locked}")
    return lines


def _paragraphs(text: str) -> Iterable[dict[str, str]]:
    for paragraph in text.split("\n\n"):
        fields: dict[str, str] = {}
        for line in paragraph.splitlines():
            name, colon, value = line.partition(": ")
            if colon and not line.startswith(" "):
                fields.setdefault(name, value.strip())
        if fields:
            yield fields
