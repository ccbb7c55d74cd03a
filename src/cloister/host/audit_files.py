"""The files of an audit log, for those who read: which segments there are, their lines, the last head, public keys.

    0000000000000001.jsonl.gz  0000000000118411.jsonl   segments, named by the number of their first line
    HEAD                       the last head, replaced as a whole after each was synced
    keys.pem                   public keys of the log, oldest first
    torn-SEQ-N.bin             half a line that a killed keeper left, kept aside

Reading needs no lock: segments are only appended to, and a compressed one takes the place of its original by rename.
Nothing here judges what is read (`audit/verify.py`); nothing here writes (`host/audit_log.py`).
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Iterator
from typing import IO, NamedTuple

import msgspec

HEAD = "HEAD"
KEYS = "keys.pem"
MAX_LINE = 1 << 20
"""Bytes. No keeper writes a longer one; a reader stops there rather than take whatever memory a file asks for."""
_CHUNK = 1 << 20
_NAME = re.compile(r"([0-9]{16})\.jsonl(\.gz)?")


class Segment(NamedTuple):
    """One file of lines."""

    first: int
    path: str

    @property
    def compressed(self) -> bool:
        """Whether it is closed for good."""
        return self.path.endswith(".gz")

    @property
    def name(self) -> str:
        """The file's own name."""
        return os.path.basename(self.path)


class Head(msgspec.Struct, frozen=True):
    """What `HEAD` holds."""

    log: str
    seq: int
    hash: str
    time: int
    """Nanoseconds since the epoch."""


class DamagedFileError(Exception):
    """A compressed segment that does not decompress, or a line without an end."""


def segment_name(first: int) -> str:
    """Return the name of the segment that begins with this line."""
    return f"{first:016d}.jsonl"


def segments(directory: str) -> list[Segment]:
    """Return the segments in order. Of one that is there twice, compressed and not, the keeper was killed: once.

    Raises:
        OSError: the directory cannot be read.
    """
    found: dict[int, str] = {}
    for name in sorted(os.listdir(directory)):
        if match := _NAME.fullmatch(name):
            found[int(match[1])] = f"{directory}/{name}"  # `.jsonl.gz` sorts last, and was renamed when it was whole
    return [Segment(first, path) for first, path in sorted(found.items())]


def read_lines(segment: Segment) -> Iterator[tuple[list[bytes], int]]:
    """Yield whole lines without their newlines, in portions; the last portion says how many bytes have no newline.

    Raises:
        OSError: it cannot be read.
        DamagedFileError: it does not decompress, or holds a line longer than `MAX_LINE`.
    """
    rest = b""
    with _open(segment) as file:
        while True:
            try:
                chunk = file.read(_CHUNK)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise DamagedFileError(str(error)) from error
            if not chunk:
                break
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > MAX_LINE:
                raise DamagedFileError(f"a line of more than {MAX_LINE} bytes")
            yield lines, 0
    yield [], len(rest)


def read_head(directory: str) -> Head | None:
    """Return the last head that was noted here; None where there is none, or it is not understood."""
    try:
        with open(f"{directory}/{HEAD}", "rb") as file:
            return msgspec.json.decode(file.read(4096), type=Head)
    except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def _open(segment: Segment) -> IO[bytes]:
    path, flags = segment.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        if segment.compressed:
            raise
        path = f"{path}.gz"  # compressed since it was listed
        descriptor = os.open(path, flags)
    file = os.fdopen(descriptor, "rb", buffering=0)
    return gzip.open(file, "rb") if path.endswith(".gz") else file  # type: ignore[return-value]
