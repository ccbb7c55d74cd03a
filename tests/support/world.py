"""A made-up internet in namespaces of the test's own: a host, a wire, and a far side that has every address.

Needs root. The host's namespace is where cloister, its broker and pasta run, under an ordinary user
id; nothing in it leads out of this machine. Ends with `close`, which kills the processes that hold it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from support import far_side
from support.cloister import User

TESTS = Path(__file__).resolve().parent.parent
HOST = ("10.77.0.2", "fd77::2")
GATEWAY = ("10.77.0.1", "fd77::1")
NEIGHBOUR = "2a00:7777::9"
"""A public address in a network that the host is attached to."""
RESOLVER = "9.9.9.9"
FAR = (
    *far_side.PUBLIC, *far_side.PRIVATE, RESOLVER, "10.255.255.1", "100.64.0.1", "169.254.169.254", "192.0.2.1",
    "2001:db8::1", "2002:a01:203::1", "64:ff9b::a01:203", "2606:4700::5efe:a01:203",
)  # fmt: skip


class World:
    """Both namespaces and what runs in them."""

    def __init__(self) -> None:
        """Make everything; the far side answers when this returns."""
        self.folder = Path(tempfile.mkdtemp(prefix="world-", dir="/tmp"))
        self.folder.chmod(0o755)
        self.arrivals = self.folder / "arrivals"
        self._far = _namespace("--net")
        self._host = _namespace("--net", "--mount", "--propagation", "private")
        try:
            self._wire()
            self._devices()
        except BaseException:
            self._end(self._host, self._far)
            raise
        self._server = subprocess.Popen(
            self.far(sys.executable, "-I", str(TESTS / "support/far_side.py"), str(self.arrivals)),
            stdout=subprocess.PIPE,
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == b"ready\n"

    def far(self, *words: str) -> list[str]:
        """Return the argv that runs `words` on the far side."""
        return ["nsenter", f"--target={self._far.pid}", "--net", *words]

    def host(self, *words: str) -> list[str]:
        """Return the argv that runs `words` on the host."""
        return ["nsenter", f"--target={self._host.pid}", "--net", "--mount", *words]

    def arrived(self) -> set[str]:
        """Return what reached the far side, as `tcp ADDRESS`, `udp ADDRESS`, `dns ADDRESS`."""
        return set(self.arrivals.read_text().splitlines()) if self.arrivals.exists() else set()

    def close(self) -> None:
        """End everything."""
        self._end(self._server, self._host, self._far)
        self._server.stdout.close()

    def _end(self, *processes: subprocess.Popen[bytes]) -> None:
        for process in processes:
            process.kill()
            process.wait()
        shutil.rmtree(self.folder)

    def _wire(self) -> None:
        there = str(self._far.pid)
        _run(self.host("ip", "link", "set", "lo", "up"))
        _run(self.host("ip", "link", "add", "wan", "type", "veth", "peer", "name", "wan", "netns", there))
        _run(self.far("ip", "link", "set", "lo", "up"))
        for side, addresses in ((self.host, HOST), (self.far, GATEWAY)):
            _run(side("ip", "link", "set", "wan", "up"))
            _run(side("ip", "address", "add", f"{addresses[0]}/24", "dev", "wan"))
            _run(side("ip", "address", "add", f"{addresses[1]}/64", "dev", "wan", "nodad"))
        _run(self.host("ip", "address", "add", "2a00:7777::2/64", "dev", "wan", "nodad"))
        _run(self.far("ip", "address", "add", f"{NEIGHBOUR}/64", "dev", "wan", "nodad"))
        for address in FAR:
            _run(self.far("ip", "address", "add", address, "dev", "lo", *(["nodad"] if ":" in address else [])))
        for address in GATEWAY:
            _run(self.host("ip", "route", "add", "default", "via", address))

    def _devices(self) -> None:
        """Give the host a tap device that users may open, and a resolver."""
        tun, resolv = self.folder / "tun", self.folder / "resolv.conf"
        os.mknod(tun, 0o20666, os.makedev(10, 200))
        tun.chmod(0o666)
        resolv.write_text(f"nameserver {RESOLVER}\n")
        _run(self.host("mount", "--bind", str(tun), "/dev/net/tun"))
        _run(self.host("mount", "--bind", str(resolv), "/etc/resolv.conf"))


class WorldUser(User):
    """An ordinary user of cloister on the host of a world."""

    def __init__(self, world: World, policy: str) -> None:
        """Make a home below the world's folder."""
        self.world = world
        self.uid = os.stat(__file__).st_uid or 60700
        home = Path(tempfile.mkdtemp(prefix="home-", dir=world.folder))
        self.project = home / "project"
        self.project.mkdir()
        super().__init__(home, policy)
        self.environment["PATH"] = "/usr/bin:/bin:/usr/sbin:/sbin"
        if source := os.environ.get("PYTHONPATH"):
            self.environment["PYTHONPATH"] = source
        for path in (home, self.runtime, *home.rglob("*")):
            os.chown(path, self.uid, self.uid)

    def command(self, *words: str) -> list[str]:
        """Return the argv of `cloister WORDS`, run by the user in the project."""
        return self.as_user(sys.executable, "-m", "cloister", *words)

    def as_user(self, *words: str) -> list[str]:
        """Return the argv that runs `words` on the host as the user."""
        ids = (f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups", "--inh-caps=-all")
        return self.world.host("setpriv", *ids, "env", "-C", str(self.project), *words)

    def python(self, script: str, agent: str = "shell", **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a Python script in the sandbox."""
        return self.run("run", agent, "--", "/usr/bin/python3", "-c", script, cwd=Path("/"), **options)


def _namespace(*kinds: str) -> subprocess.Popen[bytes]:
    """Return a process that holds new namespaces; they are there once it says so."""
    script = "echo made; exec sleep infinity"
    process = subprocess.Popen(["unshare", *kinds, "/bin/sh", "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"made\n"
    process.stdout.close()
    return process


def _run(words: list[str]) -> None:
    subprocess.run(words, check=True, capture_output=True)
