"""A sensor, a keeper's source, and a cgroup of our own: what agents do in it ends in a real log."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cloister.host import kernel_watches, sensor_ask
from cloister.host.audit_log import Log
from cloister.runs.audit_keeper import Keeper, Rules
from cloister.services.kernel_source import Source

EVADE = Path(__file__).parents[1] / "kernel/evade.c"
SETTLE_S = 10.0


PASS_ON = """
import fcntl, os, sys
split = sys.argv.index("--")
high = [fcntl.fcntl(int(one), fcntl.F_DUPFD, 200) for one in sys.argv[1:split]]
for number, descriptor in enumerate(high, 3):
    os.dup2(descriptor, number)
    os.close(descriptor)
os.environ.update(LISTEN_FDS=str(len(high)), LISTEN_PID=str(os.getpid()))
os.execvp(sys.argv[split + 1], sys.argv[split + 1:])
"""
"""Puts descriptors where systemd puts them, then becomes the program."""


class Store:
    """systemd's side of `FDSTORE`, as little of it as is needed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._held: list[tuple[str, int]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{name}")
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            data, descriptors, _, _ = socket.recv_fds(self._socket, 4096, 8)
            words = dict(line.partition("=")[::2] for line in data.decode().splitlines())
            if "FDSTORE" in words:
                self._held += [(words["FDNAME"], one) for one in descriptors]
            elif "FDSTOREREMOVE" in words:
                for one in [one for one in self._held if one[0] == words["FDNAME"]]:
                    self._held.remove(one)
                    os.close(one[1])
            elif "END" in words:
                return

    def held(self) -> list[tuple[str, int]]:
        """Return name and descriptor of what is kept."""
        return list(self._held)

    def close(self) -> None:
        """Let go of everything."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"END=1", f"\0{self.name}")
        self._thread.join(SETTLE_S)
        self._socket.close()
        for _, descriptor in self._held:
            os.close(descriptor)


class SensorRig:
    """One sensor in a process of its own, and one keeper here."""

    def __init__(self, folder: Path, *options: str, prefix: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.socket = str(folder / "sensor.sock")
        self._words = [*prefix, sys.executable, "-m", "cloister.services.sensor", "--socket", self.socket, *options]
        self.store = Store(f"cl-sensor-{os.getpid()}-{time.monotonic_ns()}")
        self.begin()
        self.cgroups: list[str] = []
        self._lines: list[dict[str, Any]] = []
        self._read: dict[str, int] = {}
        try:
            self.open_keeper()
        except BaseException:  # nobody closes what was never made: a sensor that serves nothing would stay for ever
            self.process.kill()
            self.process.wait()
            raise

    def begin(self) -> None:
        """Start a sensor, with what the one before had kept."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.socket)
        held = self.store.held()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "NOTIFY_SOCKET": f"@{self.store.name}"}
        environment["LISTEN_FDNAMES"] = ":".join(name for name, _ in held)
        numbers = [descriptor for _, descriptor in held]
        command = [sys.executable, "-c", PASS_ON, *map(str, numbers), "--", *self._words]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, pass_fds=numbers)
        self._wait(lambda: os.path.exists(self.socket) or self.process.poll() is not None)

    def open_keeper(self) -> None:
        """Begin to keep a log."""
        self.keeper = Keeper(Log(str(self.folder / "log")), str(self.folder / "keys"), Rules())
        self.source = Source(self.keeper, self.socket)
        self.keeper.tiers = self.source.heads
        self.keeper.open()
        self.keeper.wake()
        if self.process.poll() is None:
            self._wait(lambda: self._followed() or self.process.poll() is not None)

    def _followed(self) -> bool:
        self.source.turn()
        return "kernel_delivered" in self.source.heads()

    def close_keeper(self) -> None:
        """Leave the rings and the log."""
        self.source.close()
        self.keeper.close()

    def cgroup(self, name: str, **fields: str) -> str:
        """Make a cgroup and have it watched; with no fields it is not."""
        path = f"{kernel_watches.cgroup_tree()}/cloister-sensor-{os.getpid()}-{len(self.cgroups)}-{name}"
        os.mkdir(path)
        self.cgroups.append(path)
        if fields:
            self.watch(path, **fields)
        return path

    def watch(self, path: str, **fields: str) -> sensor_ask.Asked:
        """Ask for a watch of a directory or namespace file."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return sensor_ask.ask(descriptor, fields, self.socket)
        finally:
            os.close(descriptor)

    def run(self, cgroup: str, command: list[str]) -> str:
        """Run a command in a cgroup, from its first instruction on; return what it printed."""
        return self.start(cgroup, command).communicate(timeout=100)[0]

    def start(self, cgroup: str, command: list[str]) -> subprocess.Popen[str]:
        """Start a command in a cgroup."""
        procs = f"{cgroup}/cgroup.procs"
        inside = ["sh", "-c", 'echo $$ >"$0" && exec "$@"', procs, *command]
        return subprocess.Popen(inside, stdout=subprocess.PIPE, text=True)

    def turn(self, seconds: float = 0.0) -> None:
        """Take what is there: all of it, or for a while."""
        until = time.monotonic() + seconds
        while True:
            more = self.source.turn()
            if time.monotonic() >= until and not (more and not seconds):
                return
            if not more:
                time.sleep(0.01)

    def end_cgroups(self) -> None:
        """Remove the cgroups, and wait until the sensor has noticed."""
        removed = [path for path in self.cgroups if os.path.exists(path)]
        for path in removed:
            self._wait(lambda path=path: self._removed(path))
        self.cgroups = []
        if removed:
            self.turn(1.6)

    def lines(self, *kinds: str) -> list[dict[str, Any]]:
        """Return what is in the log of some kinds, after taking what waits."""
        self.turn()
        for path in sorted((self.folder / "log").glob("*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._read.get(path.name, 0))
                self._lines += map(json.loads, file)
                self._read[path.name] = file.tell()
        return [one for one in self._lines if not kinds or one["kind"] in kinds]

    def close(self) -> None:
        """End everything."""
        with contextlib.suppress(OSError):
            self.end_cgroups()
        self.close_keeper()
        self.process.terminate()
        self.process.wait(SETTLE_S)
        self.store.close()

    @staticmethod
    def _removed(path: str) -> bool:
        with contextlib.suppress(OSError):
            os.rmdir(path)
        return not os.path.exists(path)

    @staticmethod
    def _wait(condition: Callable[[], bool]) -> None:
        until = time.monotonic() + SETTLE_S
        while not condition():
            assert time.monotonic() < until, "the sensor did not come to be"
            time.sleep(0.02)


@contextlib.contextmanager
def sensor_rig(*options: str, prefix: tuple[str, ...] = ()) -> Iterator[SensorRig]:
    """Set up and tear down."""
    with tempfile.TemporaryDirectory(prefix="cloister-sensor-", dir="/tmp") as folder:
        rig = SensorRig(Path(folder), *options, prefix=prefix)
        try:
            yield rig
        finally:
            rig.close()


def evade(folder: Path) -> str:
    """Compile the program of evasions; return its path."""
    target = folder / "evade"
    subprocess.run(["cc", "-O2", "-pthread", "-o", str(target), str(EVADE)], check=True)
    return str(target)
