"""Write an initramfs: a cpio archive in the "newc" format (Linux, early-userspace/buffer-format.rst).

The same entries give the same bytes: no time, owner or inode of the machine that builds gets in. Pure. What it is not:
the choice of what goes in; `guest_entries` puts together what a guest of ours needs and nothing else does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

MODULES = "modules"
"""Where modules lie in the initramfs of a guest."""
MODULES_LIST = "modules.list"
"""One path per line, in the order of loading. Before it `?`: the machine may refuse this one; `@N `: only where there
is a virtio device of type N."""

_MAGIC = b"070701"
_ALIGN = 4
_HEAD = 110
_TRAILER = "TRAILER!!!"
_DIRECTORY, _REGULAR, _CHARACTER = 0o040000, 0o100000, 0o020000
_MAX_NAME = 255
_MAX_SIZE = (1 << 32) - 1


class Entry(NamedTuple):
    """A file, directory or character device. `name` is relative; a directory has neither data nor device."""

    name: str
    mode: int
    """Permission bits; what it is follows from the other fields."""
    data: bytes | None = None
    device: tuple[int, int] | None = None


class Module(NamedTuple):
    """A module of the kernel as it goes into an initramfs, uncompressed."""

    name: str
    data: bytes
    optional: bool = False
    """A processor may not have what it drives: its refusal is no mistake."""
    device: int = 0
    """Only where there is a virtio device of this type; 0: always."""


def newc(entries: Iterable[Entry]) -> bytes:
    """Return the archive of these entries, in their order; parents must come before what they hold.

    Raises:
        ValueError: a name or size that the format or the kernel cannot take, or one that comes twice.
    """
    parts: list[bytes] = []
    seen: set[str] = set()
    for number, entry in enumerate(entries, start=1):
        _check(entry, seen)
        seen.add(entry.name)
        parts.append(_record(entry, number))
    parts.append(_record(Entry(_TRAILER, 0), 0))
    archive = b"".join(parts)
    return archive + bytes(-len(archive) % 512)


def read(archive: bytes) -> list[Entry]:
    """Return the entries of an archive that `newc` wrote.

    Raises:
        ValueError: it is damaged, or of another writer.
    """
    entries: list[Entry] = []
    at = 0
    while True:
        head = archive[at : at + _HEAD]
        if len(head) < _HEAD or not head.startswith(_MAGIC):
            raise ValueError("not an archive of ours")
        fields = [int(head[place : place + 8], 16) for place in range(len(_MAGIC), _HEAD, 8)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + _HEAD : at + _HEAD + name_size - 1].decode()
        start = at + _HEAD + name_size + -(_HEAD + name_size) % _ALIGN
        data = archive[start : start + size]
        at = start + size + -size % _ALIGN
        if name == _TRAILER:
            return entries
        kind = mode & 0o170000
        entries.append(Entry(name, mode & 0o777, data if kind == _REGULAR else None,
                             (fields[9], fields[10]) if kind == _CHARACTER else None))  # fmt: skip


def modules_of(archive: bytes) -> list[Module]:
    """Return the modules in the initramfs of a guest, in loading order: what `guest_entries` was given.

    Raises:
        ValueError: it is no such initramfs.
    """
    files = {entry.name: entry.data or b"" for entry in read(archive)}
    found: list[Module] = []
    for line in files.get(MODULES_LIST, b"").decode().splitlines():
        optional, rest = line.startswith("?"), line.removeprefix("?")
        device, rest = rest[1:].split(" ", 1) if rest.startswith("@") else ("0", rest)
        path = rest.removeprefix("/")
        if path not in files:
            raise ValueError(f"{path} is listed and not there")
        found.append(Module(path.removeprefix(f"{MODULES}/"), files[path], optional, int(device)))
    return found


def guest_entries(shim: bytes, modules: Sequence[Module]) -> list[Entry]:
    """Return what the initramfs of a guest holds: our static program as `/init`, and the modules it loads.

    `/dev/console` is there before anything is mounted, so that PID 1 has a place to complain to.
    """
    lines = [f"{_condition(module)}/{MODULES}/{module.name}\n" for module in modules]
    entries = [Entry(name, 0o755) for name in ("dev", MODULES, "proc", "root", "sys")]
    entries.append(Entry("dev/console", 0o600, device=(5, 1)))
    entries.append(Entry("init", 0o755, data=shim))
    entries += [Entry(f"{MODULES}/{module.name}", 0o644, data=module.data) for module in modules]
    entries.append(Entry(MODULES_LIST, 0o644, data="".join(lines).encode()))
    return entries


def _condition(module: Module) -> str:
    return f"{'?' if module.optional else ''}{f'@{module.device} ' if module.device else ''}"


def _check(entry: Entry, seen: set[str]) -> None:
    parts = entry.name.split("/")
    if not entry.name.isprintable() or any(part in {"", ".", ".."} or len(part) > _MAX_NAME for part in parts):
        raise ValueError(f"not a relative path: {entry.name!r}")
    if entry.name in seen or entry.name == _TRAILER:
        raise ValueError(f"twice in one archive: {entry.name!r}")
    if len(parts) > 1 and "/".join(parts[:-1]) not in seen:
        raise ValueError(f"its directory does not come first: {entry.name!r}")
    if entry.mode & ~0o777 or (entry.data is not None and len(entry.data) > _MAX_SIZE):
        raise ValueError(f"a mode or size that does not fit: {entry.name!r}")


def _record(entry: Entry, number: int) -> bytes:
    trailer = entry.name == _TRAILER
    kind = _CHARACTER if entry.device else _REGULAR if entry.data is not None else _DIRECTORY
    mode = 0 if trailer else kind | entry.mode
    links = 2 if kind == _DIRECTORY and not trailer else 1
    major, minor = entry.device or (0, 0)
    data = entry.data or b""
    name = entry.name.encode() + b"\0"
    # ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
    fields = (number, mode, 0, 0, links, 0, len(data), 0, 0, major, minor, len(name), 0)
    head = _MAGIC + b"".join(b"%08x" % field for field in fields) + name
    return head + bytes(-len(head) % _ALIGN) + data + bytes(-len(data) % _ALIGN)
