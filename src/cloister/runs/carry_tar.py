"""Packing what is carried in from a home into a sealed tar, by the user's own process.

For runs under systemd, where the agent's uid cannot read the user's files: the user's broker reads them with the user's
rights and sends a descriptor, so root never opens anything of a home. Only named paths and what lies below them is
read; each is opened without following a link in any part of its path (`host/beneath.py`), after `find_carried` has
resolved those that the user's own set-up has (home-manager makes links into the store). What is secret is left out by
its exact place, never by a name that other files may have as well. The same files give the same bytes.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from cloister.errors import PolicyError, Problem
from cloister.host import beneath
from cloister.host.carry import Carried
from cloister.host.tar_format import MAX_BYTES, MAX_ENTRIES, Entry, TarError, encode, end, padding
from cloister.host.unit_carry import SEALS

STORES = ("/nix/store", "/gnu/store")
"""What lies there is root's, the same for all, and never changed: links into it are as good as files."""
_LOOK = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_DEPTH = 40


class Packed(NamedTuple):
    """A sealed memory file, what it has at its top, and what was left out. Whoever gets it closes `memory`."""

    memory: int
    carried: tuple[tuple[str, str], ...]
    """Names below the home, each with `file` or `directory`: what is mounted."""
    notices: tuple[str, ...]
    """What was left out, and why."""


def pack(carried: Iterable[Carried], secrets: Sequence[str], *, made: Mapping[str, bytes] | None = None) -> Packed:
    """Return a tar of what is carried in.

    Args:
        carried: what to take, as `host.carry.find_carried` has found it.
        secrets: absolute paths that are left out, with what is below them; links resolved.
        made: further files below the home, with their content: settings of the policy. They take the place of those of
            the same name.

    Raises:
        PolicyError: `carry-too-large`: more than 64 MiB or 20,000 files.
    """
    generated = dict(made or {})
    tar = _Tar(tuple(secrets), frozenset(generated))
    tops: dict[str, str] = dict.fromkeys(generated, "file")
    try:
        for name, data in generated.items():
            tar.parents(name)
            tar.file(name, data, executable=False)
        for path in sorted(carried):
            if path.name not in tops and tar.top(path):
                tops[path.name] = path.kind
        return Packed(tar.seal(), tuple(sorted(tops.items())), tuple(tar.notices))
    except BaseException:
        os.close(tar.memory)
        raise


class _Tar:
    def __init__(self, secrets: tuple[str, ...], generated: frozenset[str]) -> None:
        self._secrets, self._generated = secrets, generated
        self.memory = os.memfd_create("carried", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.notices: list[str] = []
        self._written: set[str] = set()
        self._left = MAX_BYTES
        self._source = ""

    def top(self, path: Carried) -> bool:
        """Take one carried path; say whether there was anything to take."""
        self._source = path.source
        self.parents(path.name)
        if self._is_secret(path.source):
            return False
        before = len(self._written)
        self._any(path.name, path.source, 0, ())
        return len(self._written) > before

    def parents(self, name: str) -> None:
        """Make the directories above a name."""
        parts = name.split("/")
        for count in range(1, len(parts)):
            self._directory("/".join(parts[:count]))

    def file(self, name: str, data: bytes, *, executable: bool) -> None:
        """Add a file, once."""
        if name not in self._written:
            self._left -= len(data)
            self._add(Entry(name, "file", len(data), executable))
            self._write(data + padding(len(data)))

    def seal(self) -> int:
        """Write the end, and let nobody change anything any more."""
        self._write(end())
        fcntl.fcntl(self.memory, fcntl.F_ADD_SEALS, SEALS)
        return self.memory

    def _any(self, name: str, source: str, depth: int, above: tuple[str, ...]) -> None:
        """Take a file or directory that is at `source`, in which no part is a link."""
        try:
            directory = beneath.open_root(os.path.dirname(source))
        except OSError:
            self._leave_out(name, "it cannot be read")
            return
        try:
            self._open(directory, name, source, (depth, above))
        finally:
            os.close(directory)

    def _open(self, directory: int, name: str, source: str, place: tuple[int, tuple[str, ...]]) -> None:
        """Take what the last part of `source` names in a directory."""
        last, (depth, above) = os.path.basename(source), place
        if depth > _DEPTH or source in above:
            self._leave_out(name, "it leads back to itself, or is too deep")
            return
        try:
            mode = os.stat(last, dir_fd=directory, follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                opened = os.open(last, _LOOK, dir_fd=directory)
                try:
                    self._children(opened, name, source, (depth + 1, (*above, source)))
                finally:
                    os.close(opened)
            elif stat.S_ISREG(mode):
                self._regular(directory, last, name)
            else:
                self._leave_out(name, "it is neither file nor directory")
        except FileNotFoundError:
            return  # gone in the meantime
        except (OSError, TarError):
            self._leave_out(name, "it cannot be read, or its name is too long")

    def _children(self, opened: int, name: str, source: str, place: tuple[int, tuple[str, ...]]) -> None:
        self._directory(name)
        for child in sorted(os.listdir(opened), key=os.fsencode):
            inner, path = f"{name}/{child}", f"{source}/{child}"
            if self._is_secret(path) or inner in self._generated:
                continue
            if os.path.islink(f"/proc/self/fd/{opened}/{child}"):
                self._link(inner, path, *place)
            else:
                self._open(opened, inner, path, place)

    def _link(self, name: str, path: str, depth: int, above: tuple[str, ...]) -> None:
        """Take what a link leads to, where that is carried anyway or root's own store."""
        target = os.path.realpath(path)
        if not any(target == top or target.startswith(f"{top}/") for top in (self._source, *STORES)):
            self._leave_out(name, "it is a link to another place")
        elif not self._is_secret(target):
            self._any(name, target, depth, above)

    def _regular(self, directory: int, last: str, name: str) -> None:
        opened = os.open(last, beneath.FILE_FLAGS, dir_fd=directory)
        try:
            status = os.fstat(opened)
            if not stat.S_ISREG(status.st_mode):
                self._leave_out(name, "it is neither file nor directory")
                return
            if status.st_size > self._left:
                raise _too_large(name)
            with os.fdopen(os.dup(opened), "rb") as file:
                data = file.read(self._left + 1)
            self.file(name, data, executable=bool(status.st_mode & stat.S_IXUSR))
        finally:
            os.close(opened)

    def _directory(self, name: str) -> None:
        if name not in self._written:
            self._add(Entry(name, "directory"))

    def _add(self, entry: Entry) -> None:
        if entry.name in self._written:
            return
        if self._left < 0 or len(self._written) >= MAX_ENTRIES:
            raise _too_large(entry.name)
        headers = encode(entry)
        self._written.add(entry.name)
        self._write(headers)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self.memory, view) :]

    def _is_secret(self, path: str) -> bool:
        return any(path == secret or path.startswith(f"{secret}/") for secret in self._secrets)

    def _leave_out(self, name: str, why: str) -> None:
        self.notices.append(f"~/{name} was not carried in: {why}")


def _too_large(name: str) -> PolicyError:
    message = f"more than {MAX_BYTES >> 20} MiB or {MAX_ENTRIES} files would be carried in"
    return PolicyError(
        [Problem(message, f"~/{name}", "name what is needed in `carry`, not the whole directory")],
        reference="carry-too-large",
    )
