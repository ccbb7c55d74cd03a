"""Files out of a guest, and into it, as a stream of tar: what the guest says is not trusted, and nothing is followed.

Out: plain files and directories only, into a directory that was made for it, bounded in bytes and entries; then it is
renamed to where it shall be. In: links are copied as links, and devices, sockets and the like are left out.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tarfile
import tempfile
from typing import IO, Any

from cloister.errors import StepError, UsageError
from cloister.host import removal

MAX_ENTRIES = 200_000
_MAX_LONG = 64 << 10
_CHUNK = 1 << 20
_LONG = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
)  # fmt: skip


class _Member(tarfile.TarInfo):
    """A member whose headers have an end: tarfile reads those of any size into memory."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: Any, errors: Any) -> Any:  # type: ignore[explicit-override]  # Python 3.12
        member = super().frombuf(buf, encoding, errors)
        if member.type in _LONG and member.size > _MAX_LONG:
            raise tarfile.ReadError("a name without an end")
        return member


def take_out(stream: IO[bytes], target: str, *, most_bytes: int) -> tuple[int, tuple[str, ...]]:
    """Unpack what a guest sends, whose one top-level entry becomes `target`, or goes into it where that is a directory.

    Args:
        stream: a tar, as `tar -cf - NAME` writes it.
        target: where it shall be.
        most_bytes: of all files together.

    Returns:
        How many files and directories there are now, and the names of those that were left out.

    Raises:
        UsageError: something else is there already.
        StepError: it is no tar, too large, or cannot be written; nothing is left.
    """
    parent = target if os.path.isdir(target) else os.path.dirname(os.path.abspath(target))
    try:
        work = tempfile.mkdtemp(prefix=".cloister-cp-", dir=parent)
    except OSError as error:
        raise UsageError("copy-target", f"nothing can be written there: {error.strerror}", where=parent) from None
    try:
        count, left = _unpack(stream, work, most_bytes)
        tops = os.listdir(work)
        if len(tops) != 1:
            raise StepError("copy-failed", "the guest sent no file", where=target)
        final = f"{target}/{tops[0]}" if os.path.isdir(target) else target
        if os.path.lexists(final) and (os.path.isdir(final) or os.path.isdir(f"{work}/{tops[0]}")):
            raise UsageError("copy-exists", "something is there already", where=final, remedy="name another place")
        os.rename(f"{work}/{tops[0]}", final)
    except (OSError, tarfile.TarError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise StepError("copy-failed", f"the copy could not be made: {why}", where=target) from None
    finally:
        removal.sweep(work)
    return count, left


def send_in(stream: IO[bytes], source: str) -> None:
    """Write a file or a directory as a tar whose one top-level entry is named `it`.

    Raises:
        UsageError: there is nothing.
    """
    if not os.path.lexists(source):
        raise UsageError("copy-source", "there is nothing to copy", where=source)
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT) as archive:
        archive.add(source, arcname="it", filter=_plain)


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if not (member.isreg() or member.isdir() or member.issym()):
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode &= 0o777
    return member


def _unpack(stream: IO[bytes], work: str, most_bytes: int) -> tuple[int, tuple[str, ...]]:
    count, left, room = 0, [], most_bytes
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member) as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # it remembers each, and we go through once
            count += 1
            room -= max(member.size, 0)
            if count > MAX_ENTRIES or room < 0:
                raise StepError(
                    "copy-large", f"it is more than {most_bytes} bytes or {MAX_ENTRIES} files", remedy="--max 4G"
                )
            path = _inside(work, member.name)
            if member.isdir():
                os.makedirs(path, mode=0o700, exist_ok=True)
            elif member.isreg():
                _write(archive.extractfile(member), path, member.mode)
            else:
                left.append(member.name)
    return count - len(left), tuple(left)


def _inside(work: str, name: str) -> str:
    """Return the path of an entry below the directory made for it, in which there are no links.

    Raises:
        TarError: it leads elsewhere.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if not parts or ".." in parts or name.startswith("/") or "\0" in name:
        raise tarfile.ReadError("the guest names a path outside of what was asked for")
    return "/".join([work, *parts])


def _write(source: IO[bytes] | None, path: str, mode: int) -> None:
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o700 if mode & 0o100 else 0o600), "wb") as file:
        if source is not None:
            shutil.copyfileobj(source, file, _CHUNK)
