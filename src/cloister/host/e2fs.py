"""The programs of e2fsprogs, each in a jail that has one image and nothing else: no network, no home, no devices.

An image may have been written by a hostile guest, so whatever parses it with C code does so where a takeover is worth
nothing: nothing is there, and the system calls that are left are those of one process that works on a file. The host's
kernel never mounts an image. What one holds is not looked at here; see `host/ext4`.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from cloister.errors import UnsupportedError
from cloister.host import programs
from cloister.host.memory_file import memory_file
from cloister.plan.workspace import Value

DISK = "/disk.img"
"""Where the image is in the jail."""
TIMEOUT_S = 600
MEMORY_BYTES = 4 << 30
_LAST_BYTES = 4096
_FIXED = 3
"""e2fsck(8): 1 and 2 say that errors were corrected; from 4 on something is left, or it did not run."""
_FEATURES = (
    "has_journal,ext_attr,dir_index,filetype,extent,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize"
)
_GROWING = f"{_FEATURES},64bit,metadata_csum,resize_inode"
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "MKE2FS_CONFIG": "/nowhere"}


class Filters(Value, frozen=True):
    """Filters of system calls for what looks at images: arrays of struct sock_filter. None is ever made up here."""

    tool: bytes
    """For the programs, loaded by bubblewrap."""
    reader: bytes
    """For our own reader, loaded by itself."""


class Tools(Value, frozen=True):
    """Absolute paths of what makes the jail and works in it, and the filters."""

    bubblewrap: str
    prlimit: str
    mke2fs: str
    debugfs: str
    e2fsck: str
    resize2fs: str
    filters: Filters


class DiskToolError(UnsupportedError):
    """A program of e2fsprogs failed in its jail."""

    def __init__(self, what: str, why: str, where: str) -> None:
        """Say which, with its last words."""
        super().__init__("vm-disk-tool", f"{what} failed: {why or 'it said nothing'}", where=where)


def find_tools(bubblewrap: str, filters: Filters, search: str = "") -> Tools:
    """Return the programs, which only the system's owner can have put there.

    Raises:
        UnsupportedError: one is missing; says what to install.
    """
    found = {name: programs.find(name, search).path for name in ("prlimit", "mke2fs", "debugfs", "e2fsck", "resize2fs")}
    missing = [name for name, path in found.items() if not path]
    if missing:
        raise UnsupportedError(
            "vm-disk-tools", f"disks of virtual machines need {', '.join(missing)}",
            remedy="sudo apt-get install e2fsprogs util-linux",
        )  # fmt: skip
    return Tools(bubblewrap=bubblewrap, filters=filters, **found)


def make(tools: Tools, path: str, *, inodes: int, owner: tuple[int, int], growing: bool) -> None:
    """Make an empty file system in the file `path`, as large as that is.

    Args:
        tools: the programs.
        path: a sparse file, new.
        inodes: how many files it can have at least.
        owner: user and group of its root.
        growing: it will be resized some day, and has checksums; else it is plain, to be filled by `ext4.fill`.

    Raises:
        DiskToolError: it cannot be made.
    """
    options = f"lazy_itable_init=0,lazy_journal_init=1,nodiscard,root_owner={owner[0]}:{owner[1]}"
    features = _GROWING if growing else _FEATURES
    words = [tools.mke2fs, "-q", "-F", "-b", "4096", "-I", "256", "-m", "0", "-N", str(inodes)]
    words += ["-O", f"none,{features}"]
    # A new file reads as zero: with this option (1.47.0) tables of inodes need not be written.
    code, _ = run(tools, path, [*words, "-E", f"{options},assume_storage_prezeroed=1", DISK])
    if code:
        code, said = run(tools, path, [*words, "-E", options, DISK])
        if code:
            raise DiskToolError("mke2fs", said, path)


def drop_lost_and_found(tools: Tools, path: str) -> None:
    """Remove the empty directory that mke2fs and e2fsck make in every root.

    Raises:
        DiskToolError: it stays.
    """
    code, said = run(tools, path, [tools.debugfs, "-w", "-R", "rmdir lost+found", DISK])
    if code:
        raise DiskToolError("debugfs", said, path)


def repair(tools: Tools, path: str, *, index: bool = False) -> None:
    """Replay the journal of an image and correct what is wrong with it; with `index`, also index its directories.

    Raises:
        DiskToolError: something is left that cannot be corrected.
    """
    code, said = run(tools, path, [tools.e2fsck, "-f", "-y", *(["-D"] if index else []), DISK])
    if code < 0 or code > _FIXED:
        raise DiskToolError("e2fsck", said, path)


def grow(tools: Tools, path: str) -> None:
    """Make a file system as large as its file has become. It must be clean.

    Raises:
        DiskToolError: it keeps its size.
    """
    code, said = run(tools, path, [tools.resize2fs, DISK])
    if code:
        raise DiskToolError("resize2fs", said, path)


def run(tools: Tools, path: str, words: Sequence[str]) -> tuple[int, str]:
    """Run a program in the jail of the image `path`; return its exit code (negative: killed) and its last words."""
    limits = [tools.prlimit, f"--as={MEMORY_BYTES}", "--core=0", "--nofile=64", "--"]
    with open("/dev/null", "rb") as nothing, _filter(tools) as narrow, subprocess.Popen(
        [*_jail(tools, path, nothing.fileno(), narrow), *limits, *words],
        env=_ENVIRONMENT, cwd="/", pass_fds=(nothing.fileno(), narrow),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            said = _last_words(process)
            return process.wait(timeout=TIMEOUT_S), said
        except subprocess.TimeoutExpired:
            return -1, f"it took longer than {TIMEOUT_S} s"
        finally:
            with suppress(ProcessLookupError):
                process.kill()


@contextmanager
def _filter(tools: Tools) -> Iterator[int]:
    """Yield a descriptor of the jail's filter.

    Raises:
        DiskToolError: there is none, and bubblewrap would take an empty one.
    """
    if not tools.filters.tool or len(tools.filters.tool) % 8:
        raise DiskToolError("the jail", "it has no filter of system calls", tools.bubblewrap)
    descriptor = memory_file("narrow", tools.filters.tool)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _jail(tools: Tools, path: str, nothing: int, narrow: int) -> list[str]:
    argv = [tools.bubblewrap, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    for name in ("usr", "bin", "sbin", "lib", "lib64", "lib32", "nix/store"):
        if os.path.islink(f"/{name}"):
            argv += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
        elif os.path.isdir(f"/{name}"):
            argv += ["--ro-bind", f"/{name}", f"/{name}"]
    if os.path.isfile("/etc/ld.so.cache"):
        argv += ["--ro-bind", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    argv += ["--file", str(nothing), "/etc/mtab"]  # resize2fs asks what is mounted; in here nothing is
    return [*argv, "--bind", path, DISK, "--chdir", "/", "--seccomp", str(narrow), "--"]


def _last_words(process: subprocess.Popen[bytes]) -> str:
    """Read all that it says until it ends, keep the end of it.

    Raises:
        TimeoutExpired: it takes too long.
    """
    until = time.monotonic() + TIMEOUT_S
    said = b""
    with selectors.DefaultSelector() as selector:
        assert process.stdout is not None  # noqa: S101  # it is a pipe
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, until - time.monotonic())):
                raise subprocess.TimeoutExpired(process.args, TIMEOUT_S)
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                break
            said = (said + data)[-_LAST_BYTES:]
    lines = [line for line in said.decode("ascii", "replace").splitlines() if line.strip()]
    return "; ".join(line.strip() for line in lines[-3:])
