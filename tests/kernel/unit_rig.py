"""The inner half as the main process of a unit, with bubblewrap in systemd's place.

Not systemd: there is no cgroup that would end what is left, so what is gone was ended by the shim itself.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from shim_rig import ENVIRONMENT, Rig, as_user, family, order, seccomp_without_userns

from cloister.host import frames

PTY = 1
# No PID namespace, as where systemd has no PrivatePIDs=. Bubblewrap waits outside, and hands the status on.
WALLS = ["/usr/bin/bwrap", "--unshare-user", "--unshare-net", "--unshare-ipc", "--ro-bind", "/", "/", "--dev", "/dev"]


def filter_file(text: bytes) -> int:
    """Return a descriptor that reads as a seccomp filter."""
    handle = os.memfd_create("filter")
    os.write(handle, text)
    os.lseek(handle, 0, os.SEEK_SET)
    return handle


class Unit:
    """One inner half with `--unit --ctl 0`; standard output and error are nobody's."""

    def __init__(self, rig: Rig, *options: str, seccomp: bool = True, more: Sequence[str] = ()) -> None:
        self.rig = rig
        self.seen: list[tuple[str, bytes]] = []
        self.looks = True
        broker, theirs = socket.socketpair()
        self.channel = frames.Channel(broker)
        filtered = filter_file(seccomp_without_userns())
        inner = ["inner", "--unit", "--ctl", "0", "--egress", str(rig.relay.path), "--listen", "127.0.0.1:3128"]
        inner += ["--probe-write", "/usr", "--probe-connect", "192.0.2.1:9", *options]
        closed = ["--seccomp", str(filtered)] if seccomp else []
        work = ["--bind", str(rig.work), str(rig.work)]
        self.process = subprocess.Popen(
            [*WALLS, *work, *closed, "--cap-drop", "ALL", *more, "--", str(rig.shim), *inner],
            stdin=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=[filtered], **as_user(),
        )  # fmt: skip
        theirs.close()
        os.close(filtered)

    def until(self, kind: str, timeout_s: float = 10) -> bytes:
        """Return the payload of the next frame of this type."""
        return self.frame(kind, timeout_s).payload

    def frame(self, kind: str, timeout_s: float = 10) -> frames.Frame:
        """Return the next frame of this type; those before it are kept in `seen`."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            select.select([self.channel], [], [], 0.1)
            while frame := self.channel.receive():
                if frame.kind == "E" and self.looks and frame.payload[:4] == bytes(4):
                    with contextlib.suppress(frames.FrameError):  # it does not wait for long
                        self.channel.send("D")  # as the broker does when it has looked at the cgroup
                if frame.kind == kind:
                    return frame
                self.seen.append((frame.kind, frame.payload))
        raise AssertionError(f"no {kind}: {self.seen}, {self.process.poll()}")

    def begin(self) -> list[str]:
        """Say that the mounts are made; return what the self-probe found."""
        self.channel.send("B")
        return [item.decode() for item in frames.decode_list(self.until("P"))[0]]

    def go(self, *command: str, stdio: Sequence[int] = (), flags: int = 0) -> None:
        """Start the agent, with these descriptors."""
        self.channel.send("G", frames.encode_u32(flags) + order(command, ENVIRONMENT, "/"), stdio)

    def run(self, *command: str) -> tuple[int, bytes]:
        """Begin, start the agent, and return its exit code and output."""
        self.begin()
        with tempfile.TemporaryFile() as out, Path(os.devnull).open("rb") as null:
            self.go(*command, stdio=[null.fileno(), out.fileno(), out.fileno()])
            code = self.process.wait(15)
            out.seek(0)
            return code, out.read()

    def stop(self, number: int) -> None:
        """Send the signal that systemd would send to the main process."""
        (main,) = (pid for pid in family(self.process.pid) if _line(pid).startswith(os.fsencode(self.rig.shim)))
        os.kill(main, number)

    def close(self) -> None:
        """End it, if it has not ended."""
        self.channel.close()
        self.process.kill()
        self.process.wait()


def _line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def living(marker: str) -> set[int]:
    """Return the processes, wherever they hang, whose command line has `marker`."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if marker.encode() in line and state not in "ZX":
                found.add(int(entry.name))
    return found
