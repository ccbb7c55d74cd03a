"""The sandbox's `/etc`: a small assembled copy, made once and shared by all runs of a user.

Host names, mail aliases, sudoers, network secrets and other accounts are nobody's business
in there, so nothing is carried in but what programs need to start: certificates, the loader's
cache, locale, time zone, terminal and service names. `passwd`, `group`, `hosts`,
`nsswitch.conf` and `resolv.conf` are written, not copied. One directory is one mount, where
fifteen binds would cost two milliseconds of each start.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat

from cloister.host.owner import Owner

CARRIED = (
    "alternatives", "bash.bashrc", "ca-certificates", "ca-certificates.conf", "crypto-policies",
    "debian_version", "fonts", "host.conf", "inputrc", "java-11-openjdk", "java-17-openjdk", "java-21-openjdk",
    "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "locale.alias", "lsb-release", "magic",
    "mailcap", "manpath.config", "mime.types", "nanorc", "npmrc", "os-release", "papersize", "perl", "pki",
    "profile", "protocols", "python3", "python3.11", "python3.12", "python3.13", "rpc", "services", "shells",
    "ssl", "terminfo", "timezone", "vim", "xattr.conf",
)  # fmt: skip
PRIVATE = ("private",)
"""Directory names left out wherever they appear: `/etc/ssl/private` holds keys."""
_MAX_FILE_BYTES = 4 << 20
_RESOLV = "nameserver {}\noptions edns0 timeout:3\n"  # EDNS: answers over 512 bytes come without TCP (RFC 6891)
_NSSWITCH = "passwd: files\ngroup: files\nhosts: files dns\nservices: files\nprotocols: files\n"


def assemble(parent: str, owner: Owner, *, hostname: str, nameserver: str = "") -> str:
    """Return the directory that holds the copy for these facts, making it when it is new or outdated.

    The name is a digest of what it is made from, so an update of the host's certificates gives
    a new directory, running sandboxes keep theirs, and concurrent makers agree.

    Raises:
        OSError: the parent cannot be written.
    """
    written = _written(owner, hostname=hostname, nameserver=nameserver)
    target = f"{parent}/{_digest(written)}"
    if os.path.isdir(target):
        return target
    partial = f"{target}.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial, mode=0o755)
    for name in CARRIED:
        _copy(f"/etc/{name}", os.path.join(partial, name))
    for name, text in written.items():
        with open(os.path.join(partial, name), "w", encoding="utf-8") as file:
            file.write(text)
    _open_modes(partial)  # the broker's umask is 077; inside, services of the agent may drop to another uid
    try:
        os.rename(partial, target)
    except OSError:  # another broker was first
        shutil.rmtree(partial, ignore_errors=True)
        if not os.path.isdir(target):
            raise
    return target


def locate(parent: str, owner: Owner, *, hostname: str, nameserver: str = "") -> str:
    """Return the directory that `assemble` would return for these facts, without making it."""
    return f"{parent}/{_digest(_written(owner, hostname=hostname, nameserver=nameserver))}"


def _written(owner: Owner, *, hostname: str, nameserver: str) -> dict[str, str]:
    user, uid, gid, home = owner.name, owner.uid, owner.gid, owner.home
    return {
        "passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
        + (f"{user}:x:{uid}:{gid}::{home}:/bin/sh\n" if uid else ""),
        "group": f"root:x:0:\nnogroup:x:65534:\n{user}:x:{gid}:\n",
        "hosts": f"127.0.0.1 localhost {hostname}\n::1 localhost\n",
        "hostname": f"{hostname}\n",
        "nsswitch.conf": _NSSWITCH,
        "resolv.conf": _RESOLV.format(nameserver) if nameserver else "# names are resolved by the egress proxy\n",
        "machine-id": hashlib.sha256(f"{uid}:{hostname}".encode()).hexdigest()[:32] + "\n",
    }


def _digest(written: dict[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(written.items())).encode())
    for name in CARRIED:
        _digest_tree(digest, f"/etc/{name}")
    return digest.hexdigest()[:32]


def _open_modes(top: str) -> None:
    """Give directories 0755 and files 0644, as `/etc` has them."""
    os.chmod(top, 0o755)  # noqa: S103  # a copy of what is public
    for directory, names, files in os.walk(top):
        for name in names:
            if not os.path.islink(f"{directory}/{name}"):
                os.chmod(f"{directory}/{name}", 0o755)  # noqa: S103  # a copy of what is public
        for name in files:
            if not os.path.islink(f"{directory}/{name}"):
                os.chmod(f"{directory}/{name}", 0o644)


def _digest_tree(digest: hashlib._Hash, path: str) -> None:
    """Add size and time of the top entry and its children: package updates rewrite those."""
    try:
        info = os.stat(path)
        digest.update(f"{path}:{info.st_mtime_ns}:{info.st_size}\n".encode())
        if stat.S_ISDIR(info.st_mode):
            for entry in sorted(os.listdir(path)):
                child = os.lstat(os.path.join(path, entry))
                digest.update(f"{entry}:{child.st_mtime_ns}:{child.st_size}\n".encode())
    except OSError:
        digest.update(f"{path}:absent\n".encode())


def _copy(source: str, target: str) -> None:
    """Copy what the user may read anyway; links stay links (most of `/etc` points into `/usr`)."""
    try:
        info = os.lstat(source)
        if stat.S_ISLNK(info.st_mode):
            link = os.readlink(source)
            points_home = os.path.realpath(source).startswith("/etc/")
            os.symlink(link, target) if not points_home or _kept(link) else shutil.copyfile(source, target)
        elif stat.S_ISDIR(info.st_mode):
            if os.path.basename(source) in PRIVATE:
                return
            os.mkdir(target, 0o755)
            for entry in os.listdir(source):
                _copy(os.path.join(source, entry), os.path.join(target, entry))
        elif stat.S_ISREG(info.st_mode) and info.st_size <= _MAX_FILE_BYTES:
            shutil.copyfile(source, target)
    except OSError:
        return  # unreadable for the user: not there for the agent


def _kept(link: str) -> bool:
    """Tell whether a link inside `/etc` leads to something that is carried too."""
    return not link.startswith("/etc/") or link.split("/")[2] in CARRIED
