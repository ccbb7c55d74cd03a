"""A real PostgreSQL for a test: a cluster of its own, on a Unix socket only, run by an ordinary user."""

from __future__ import annotations

import glob
import os
import pwd
import shutil
import subprocess
import tempfile
from types import TracebackType
from typing import Self

import pytest

NOBODY = 65534


def _somebody(directory: str) -> list[str]:
    """Return the beginning of a command that runs it as a user the server accepts: not root, and with a name."""
    if os.geteuid() == 0:
        os.chown(directory, NOBODY, NOBODY)
        return ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"]
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:  # the user of `tools/test` has none: it is nobody in a user namespace
        return ["unshare", "--user", f"--map-user={NOBODY}", f"--map-group={NOBODY}"]
    return []


class Postgres:
    """A cluster that can be stopped, as by a power cut too, and started again."""

    def __init__(self) -> None:
        """Make the cluster; skips the test where PostgreSQL is not installed."""
        found = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))
        if not found:
            pytest.skip("PostgreSQL is not installed; tools/packages does it")
        self._programs = os.path.dirname(found[-1])
        self.directory = tempfile.mkdtemp(prefix="pg-")  # short: the path of a Unix socket has 107 bytes at most
        self._as = _somebody(self.directory)
        self._data = f"{self.directory}/data"
        self.address = f"postgresql://cloister@/postgres?host={self.directory}"
        self._run("initdb", "-D", self._data, "-U", "cloister", "-A", "trust", "--no-sync", "-E", "UTF8")
        self.running = False

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        options = f"-k {self.directory} -c listen_addresses='' -c shared_buffers=16MB -c fsync=off"
        self._run("pg_ctl", "-D", self._data, "-w", "-t", "30", "-l", f"{self.directory}/log", "-o", options, "start")
        self.running = True

    def stop(self, mode: str = "immediate") -> None:
        """Stop the server; `immediate` is as if it had been killed."""
        if self.running:
            self._run("pg_ctl", "-D", self._data, "-w", "-m", mode, "stop")
            self.running = False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _run(self, program: str, *words: str) -> None:
        command = [*self._as, f"{self._programs}/{program}", *words]
        environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        done = subprocess.run(
            command, cwd="/", env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout.decode(errors="replace")
