"""Where a guest image is put together: a sandbox in which its maker seems to be root, and is nobody.

Packages of a distribution expect root: they give files to other owners and make devices. Here one user id stands for
all, in a user namespace of bubblewrap's, and a seccomp filter answers calls that change an owner, an identity or make a
device with success without doing them (as Charliecloud's root emulation does). So a build needs neither root nor ranges
of subordinate ids, is the same for everybody, and scripts of packages reach no file of the host. What the image says
about owners is decided when it is written: everything in it is root's.
"""

from __future__ import annotations

import os
import platform
import re
import struct
import subprocess
from collections.abc import Callable, Mapping, Sequence

from cloister.errors import DeniedError, StepError, UnsupportedError
from cloister.host.memory_file import memory_file
from cloister.host.programs import find

Say = Callable[[str], None]
"""Told what is being done, in a few words."""

_LAST_LINES = 12
_NOISE = ("I: skipping", "I: running --", "I: chroot architecture", "I: automatically", "I: finding", "I: success")

_VARIABLES = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
_PROXIES = ("http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")

# Classic BPF and seccomp's answers: linux/bpf_common.h, linux/seccomp.h.
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_OFFSET_NUMBER, _OFFSET_ARCH = 0, 4
_EPERM = 1

# AUDIT_ARCH_* and numbers of: chown fchown lchown fchownat, setuid setgid setreuid setregid setresuid setresgid
# setgroups setfsuid setfsgid, mknod mknodat (arch/x86/entry/syscalls/syscall_64.tbl,
# include/uapi/asm-generic/unistd.h).
_PRETENDED = {
    "x86_64": (0xC000003E, (92, 93, 94, 260, 105, 106, 113, 114, 117, 119, 116, 122, 123, 133, 259)),
    "aarch64": (0xC00000B7, (55, 54, 146, 144, 145, 143, 147, 149, 159, 151, 152, 33)),
}

_ETC = tuple(f"/etc/{name}" for name in (
    "alternatives", "apt/apt.conf.d", "apt/trusted.gpg.d", "ca-certificates.conf", "dpkg", "group", "host.conf",
    "hosts", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "nsswitch.conf", "passwd", "pki", "resolv.conf", "services",
    "ssl",
))  # fmt: skip
"""What programs of the host read there; nothing of it is a secret."""


def pretend_filter(arch: str) -> bytes:
    """Return the filter that lets calls succeed without doing them, as an array of struct sock_filter.

    Raises:
        UnsupportedError: `image-arch`: the numbers of this architecture's calls are not known here.
    """
    if arch not in _PRETENDED:
        raise UnsupportedError("image-arch", f"images cannot be built on {arch}", remedy="build on x86_64 or aarch64")
    audit, numbers = _PRETENDED[arch]
    lines = [(_LOAD, 0, 0, _OFFSET_ARCH), (_EQUAL, 1, 0, audit), (_RETURN, 0, 0, _ERRNO | _EPERM),
             (_LOAD, 0, 0, _OFFSET_NUMBER)]  # fmt: skip
    lines += [(_EQUAL, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    lines += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO)]
    return b"".join(struct.pack("<HBBI", *line) for line in lines)


def command(
    argv: Sequence[str],
    work: str,
    *,
    read: Sequence[str] = (),
    network: bool,
    environment: Mapping[str, str] | None = None,
) -> tuple[list[str], int]:
    """Return the argv that runs a program as the seeming root, and the descriptor that it needs (to be passed on).

    Args:
        argv: what to run; found on the usual PATH.
        work: the only directory that it may write to, at the same path inside.
        read: paths beside the system's own that it may read, at the same paths.
        network: whether it may use the machine's network.
        environment: variables, the only ones besides PATH and the locale.

    Raises:
        UnsupportedError: `image-tool-missing`: there is no bubblewrap; `image-arch`.
    """
    bwrap = tool("bwrap", "bubblewrap")
    words = [bwrap, "--unshare-user", "--uid", "0", "--gid", "0", "--unshare-ipc", "--unshare-pid", "--unshare-uts",
             "--unshare-cgroup-try", "--hostname", "image", "--die-with-parent", "--new-session", "--clearenv",
             "--cap-add", "ALL", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp", "--tmpfs", "/run"]  # noqa: S108  # fmt: skip
    variables = _VARIABLES | {"HOME": work, "TMPDIR": work}
    if network:
        variables |= {name: os.environ[name] for name in _PROXIES if name in os.environ}
    else:
        words.append("--unshare-net")
    words += ["--ro-bind", "/usr", "/usr"]
    for path in _ETC:
        words += ["--ro-bind-try", os.path.realpath(path), path]
    for path in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
        if os.path.islink(path):
            words += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            words += ["--ro-bind", path, path]
    for path in read:
        words += ["--ro-bind", path, path]
    words += ["--bind", work, work, "--chdir", work]
    for name, value in (variables | dict(environment or {})).items():
        words += ["--setenv", name, value]
    descriptor = memory_file("cloister-image-filter", pretend_filter(platform.machine()), inheritable=True)
    return [*words, "--seccomp", str(descriptor), "--", *argv], descriptor


def tool(name: str, package: str) -> str:
    """Return the path of a program that a build needs.

    Raises:
        UnsupportedError: `image-tool-missing`.
    """
    found = find(name, os.environ.get("PATH", ""))
    if not found.path:
        raise UnsupportedError(
            "image-tool-missing", f"{name} is needed for guest images and is not here", where=found.refused,
            remedy=f"sudo apt-get install {package}",
        )  # fmt: skip
    return found.path


def run(  # noqa: PLR0913  # each says what the program may use
    argv: Sequence[str], work: str, *, network: bool, environment: dict[str, str] | None = None, say: Say | None = None,
    read: Sequence[str] = (),
) -> str:  # fmt: skip
    """Run a program in the jail, as the owner of `work`; return what it printed.

    Raises:
        DeniedError: `image-root`: that would be root.
        StepError: `image-build`, with its last lines.
    """
    words, descriptor = command(argv, work, read=read, network=network, environment=environment)
    lines: list[str] = []
    # Whose directory it is, is who works in it: never root (`image_place`).
    owner = os.stat(work).st_uid
    if owner == 0:
        raise DeniedError("image-root", "programs of a build are never run as root", where=work)
    who = {"user": owner, "group": owner, "extra_groups": []} if owner != os.getuid() else {}
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", pass_fds=(descriptor,), **who,  # type: ignore[call-overload]
        )  # fmt: skip
    finally:
        os.close(descriptor)
    with process:
        assert process.stdout  # noqa: S101  # it is a pipe
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                if say and line.startswith("I: ") and not line.startswith(_NOISE):
                    say(line[3:].strip().removesuffix("..."))
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        last = [without_hosts(line) for line in lines if line and not line.startswith("I: ")][-_LAST_LINES:]
        what = f"{os.path.basename(argv[0])} failed ({process.returncode}): {' / '.join(last)}"
        raise StepError(
            "image-build", what, remedy="look at the packages of the recipe, and at this machine's apt sources"
        )
    return "\n".join(lines)


def without_hosts(line: str) -> str:
    """Keep names of a company's mirrors out of messages that people paste."""
    return re.sub(r"(https?://)[^/ ]+", r"\1…", line)[:300]
