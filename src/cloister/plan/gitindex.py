"""Paths in git's index that git would never put there itself: bytes in, the offending paths out.

git checks a path when it adds it to the index, but not when it reads the file: with a forged index,
`git checkout .` writes `.git/hooks/pre-commit`, or a file above the work tree (tried with 2.39.5). An agent
may write the index, so it is read after a run, before the person's git reads it. Format:
gitformat-index(5), versions 2 to 4. Not a validator of anything else in it.
"""

from __future__ import annotations

from collections.abc import Iterator

_HEADER = 12
_FIXED = 40
"""Bytes of an entry before the object name: times, device, inode, mode, owner, size."""
_EXTENDED = 0x4000
MAX_PATHS = 20


def forged_paths(data: bytes, *, hash_bytes: int = 20) -> list[str]:
    """Return up to `MAX_PATHS` paths that lead into `.git` or out of the work tree.

    A file that cannot be parsed to its end yields `(unreadable)`: it must not pass for clean.

    Args:
        data: the whole file.
        hash_bytes: length of an object name, 20 for SHA-1 and 32 for SHA-256 repositories.
    """
    out: list[str] = []
    try:
        for path in _paths(data, hash_bytes):
            if _forged(path):
                out.append(path.decode("utf-8", "surrogateescape"))
                if len(out) >= MAX_PATHS:
                    break
    except (IndexError, ValueError):
        out.append("(unreadable)")
    return out


def _forged(path: bytes) -> bool:
    # NTFS and HFS+ spellings (`GIT~1`, ignorable characters) do not matter on Linux; case does on casefolded ext4.
    return any(part in {b"", b".", b"..", b".git"} for part in path.lower().split(b"/"))


def _paths(data: bytes, hash_bytes: int) -> Iterator[bytes]:
    if not data:
        return
    if data[:4] != b"DIRC":
        raise ValueError(data[:4])
    version = int.from_bytes(data[4:8], "big")
    if version not in {2, 3, 4}:
        raise ValueError(version)
    at = _HEADER
    path = b""
    for _ in range(int.from_bytes(data[8:12], "big")):
        start = at
        flags = int.from_bytes(data[at + _FIXED + hash_bytes : at + _FIXED + hash_bytes + 2], "big")
        at += _FIXED + hash_bytes + (4 if flags & _EXTENDED and version > 2 else 2)  # noqa: PLR2004 (the version)
        if version == 4:  # noqa: PLR2004 (the version)
            strip, at = _offset(data, at)
            if strip > len(path):
                raise ValueError(strip)
            end = data.index(b"\0", at)
            path = path[: len(path) - strip] + data[at:end]
            at = end + 1
        else:
            end = data.index(b"\0", at)
            path = data[at:end]
            at = start + ((end - start + 8) & ~7)
        yield path


def _offset(data: bytes, at: int) -> tuple[int, int]:
    """Read a variable width number, as in offset deltas of a pack (gitformat-pack(5))."""
    byte = data[at]
    at += 1
    value = byte & 0x7F
    while byte & 0x80:
        byte = data[at]
        at += 1
        value = ((value + 1) << 7) | (byte & 0x7F)
    return value, at
