"""Where Cloister keeps things for one user: XDG directories, and nothing outside them.

Configuration is the owner's word, state is kept, runtime is gone after a reboot. There is no
fallback into `/tmp`: a directory there can be made by somebody else first. Facts come in as
arguments, so that tests and the broker can say whose directories are meant.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

SYSTEM_POLICY = "/etc/cloister/cloister.toml"


class Paths(NamedTuple):
    """All places, as absolute paths."""

    home: str
    config: str
    state: str
    runtime: str
    cache: str = ""

    @property
    def policy(self) -> str:
        """The user's policy file."""
        return f"{self.config}/cloister.toml"

    @property
    def presets(self) -> str:
        """Directory of the user's own presets."""
        return f"{self.config}/presets"

    @property
    def decisions(self) -> str:
        """What the user answered with `always` and `never`."""
        return f"{self.config}/decisions.json"

    @property
    def blocked(self) -> str:
        """Agents whose model calls are blocked."""
        return f"{self.state}/blocked.json"

    @property
    def runs(self) -> str:
        """One directory per run, kept until `cloister gc`."""
        return f"{self.state}/runs"

    @property
    def agents(self) -> str:
        """Agents' own state: one directory per agent and project."""
        return f"{self.state}/agents"

    @property
    def etc(self) -> str:
        """Assembled copies of `/etc`."""
        return f"{self.state}/etc"

    @property
    def logins(self) -> str:
        """Logins made by `cloister login`: tokens, for the broker alone."""
        return f"{self.state}/logins"

    @property
    def audit(self) -> str:
        """The user's own audit log, where the system keeps none."""
        return f"{self.state}/audit"

    @property
    def audit_key(self) -> str:
        """Directory of the key that signs it: not beside it, since the log may be copied."""
        return f"{self.state}/audit-key"

    @property
    def templates(self) -> str:
        """Templates that virtual machines start from."""
        return f"{self.cache or self.state}/vm/templates"

    @property
    def snapshots(self) -> str:
        """Virtual machines that were kept as they were, by name."""
        return f"{self.state}/vm/snapshots"

    @property
    def broker_socket(self) -> str:
        """Where the broker listens."""
        return f"{self.runtime}/broker.sock"

    def run_state(self, run: str) -> str:
        """Directory of one run's records."""
        return f"{self.runs}/{run}"

    def run_runtime(self, run: str) -> str:
        """Directory that exists only while the run does; shown to it read-only."""
        return f"{self.runtime}/runs/{run}"


def locate(environ: Mapping[str, str], home: str, uid: int) -> Paths:
    """Return the places for a user. Relative XDG values are ignored, as the XDG specification says."""
    config = _absolute(environ.get("XDG_CONFIG_HOME")) or f"{home}/.config"
    state = _absolute(environ.get("XDG_STATE_HOME")) or f"{home}/.local/state"
    runtime = _absolute(environ.get("XDG_RUNTIME_DIR")) or _session(uid) or f"{state}/cloister"
    cache = _absolute(environ.get("XDG_CACHE_HOME")) or f"{home}/.cache"
    return Paths(home, f"{config}/cloister", f"{state}/cloister", f"{runtime}/cloister", f"{cache}/cloister")


def _session(uid: int) -> str:
    """Return systemd's directory for the user, when there is one and it is the user's (not set under `su`)."""
    path = f"/run/user/{uid}"
    try:
        return path if os.lstat(path).st_uid == uid else ""
    except OSError:
        return ""


def _absolute(value: str | None) -> str:
    return value.rstrip("/") if value and value.startswith("/") else ""
