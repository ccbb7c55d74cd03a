"""Whose machine this is: user, name of the host, and git's idea of the user. Reads only."""

from __future__ import annotations

import os
import pwd
import subprocess
from typing import NamedTuple

_GIT_KEYS = ("user.name", "user.email", "safe.directory", "init.defaultbranch", "core.quotepath", "pull.rebase")
"""Identity and tastes; nothing through which git runs a program (aliases, hooks, filters, helpers, pagers)."""
_SIGNING_KEYS = ("gpg.format", "user.signingkey", "commit.gpgsign", "tag.gpgsign")
"""How the person signs; carried in only for keys that the policy names."""


class Owner(NamedTuple):
    """The user, from the kernel's ids and the password database."""

    uid: int
    gid: int
    name: str
    home: str


def identify(home: str = "") -> Owner:
    """Return the user this process runs as. Without an entry in the password database `home` must be given."""
    uid, gid = os.getuid(), os.getgid()
    try:
        entry = pwd.getpwuid(uid)
        return Owner(uid, gid, entry.pw_name, home or entry.pw_dir)
    except KeyError:
        return Owner(uid, gid, f"user{uid}", home)


class GitSettings:
    """The user's global git settings, read again when a file they come from changes."""

    def __init__(self, home: str, config: str) -> None:
        """Look below `home` and the XDG `config` directory (git-config(1), FILES)."""
        self._files = (f"{home}/.gitconfig", f"{config}/git/config")
        self._home = home
        self._seen: tuple[int, ...] | None = None
        self._settings: tuple[tuple[str, str], ...] = ()

    def read(self) -> tuple[tuple[str, str], ...]:
        """Return the settings that are carried in, in git's order."""
        return tuple((key, value) for key, value in self._current() if key in _GIT_KEYS)

    def signing(self) -> dict[str, str]:
        """Return the settings that say how the person signs commits and tags."""
        return {key: value for key, value in self._current() if key in _SIGNING_KEYS}

    def _current(self) -> tuple[tuple[str, str], ...]:
        stamp = tuple(_stamp(path) for path in self._files)
        if stamp != self._seen:
            self._seen = stamp
            self._settings = self._list() if any(stamp) else ()
        return self._settings

    def _list(self) -> tuple[tuple[str, str], ...]:
        environment = {"HOME": self._home, "PATH": "/usr/bin:/bin", "GIT_CONFIG_NOSYSTEM": "1"}
        try:
            done = subprocess.run(
                ["git", "config", "--global", "--includes", "--list", "-z"],
                env=environment, cwd="/", capture_output=True, check=False, timeout=5,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return ()
        pairs = (entry.partition("\n") for entry in done.stdout.decode("utf-8", "replace").split("\0") if entry)
        return tuple((key, value) for key, _, value in pairs if key in (*_GIT_KEYS, *_SIGNING_KEYS))


def _stamp(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0
