"""The keeper between a fake broker and a real guest end of the link, which is PID 1 of a sandbox in place of a machine.

The keeper is PID 1 of a jail of bubblewrap's, as in a run. No monitor and no machine: what runs as its monitor is a
second bubblewrap with `guest_alone.c`. Its inner half is the shim's own, with all its walls and probes.
"""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from shim_rig import ENVIRONMENT, Relay, as_user, order, seccomp_without_userns

import shim_build
from cloister.host import frames

PTY = 1
JAIL = "/usr/bin/bwrap --unshare-all --die-with-parent --as-pid-1 --ro-bind / / --proc /proc --dev /dev --cap-drop ALL"
WALLS = "/usr/bin/bwrap --unshare-all --die-with-parent --as-pid-1 --ro-bind / / --proc /proc --dev /dev --tmpfs /run"
NUMBERED = (
    "import os, sys; at = sys.argv.index('--'); pairs = [tuple(map(int, one.split(':'))) for one in sys.argv[1:at]]; "
    "[os.dup2(*one) for one in pairs]; os.execv(sys.argv[at + 1], sys.argv[at + 1:])"
)
"""In the child: descriptors at numbers that may be anybody's in this process."""
PLACE = "--dir /run/cloister --dir /run/cloister/box --tmpfs /tmp --cap-drop ALL"


class Place:
    """A directory that the ordinary user can reach: programs, a box with a relay in it, a writable place."""

    def __init__(self, *, sanitized: bool = False) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="cloister-keeper-", dir="/tmp"))
        self.directory.chmod(0o777)
        self.shim, self.guest = self.directory / "cloister-shim", self.directory / "guest-alone"
        shutil.copy(shim_build.sanitized_shim() if sanitized else shim_build.shim(), self.shim)
        shutil.copy(shim_build.guest_alone(), self.guest)
        self.box, self.work = self.directory / "box", self.directory / "work"
        for path in (self.box, self.work):
            path.mkdir()
            path.chmod(0o777)
        self.relay = Relay(self.box / "egress.sock")

    def close(self) -> None:
        """Remove everything."""
        self.relay.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def place_of_test() -> Iterator[Place]:
    """Body of the `place` fixture."""
    place = Place()
    try:
        yield place
    finally:
        place.close()


def memory(text: bytes, name: str = "text") -> int:
    """Return a descriptor that reads as this text, away from the numbers that the monitor's are."""
    handle = os.memfd_create(name)
    os.write(handle, text)
    os.lseek(handle, 0, os.SEEK_SET)
    moved = fcntl.fcntl(handle, fcntl.F_DUPFD_CLOEXEC, 40)
    os.close(handle)
    return moved


def _jail(place: Place) -> list[str]:
    """Return bubblewrap's words for what is around the keeper."""
    directory, box, work = str(place.directory), str(place.box), str(place.work)
    return [*JAIL.split(), "--bind", directory, directory, "--ro-bind", box, box, "--bind", work, work]


def machine(place: Place, filtered: int, *, channel: str = "guest") -> list[str]:
    """Return what stands in a machine's place: a sandbox whose PID 1 is the guest's end of the link.

    Its descriptor 20 is that end (`guest`), or a socket that accepts it (`listen`).
    """
    words = [*WALLS.split(), *PLACE.split(), "--ro-bind", str(place.guest), str(place.guest)]
    words += ["--bind", str(place.work), str(place.work), "--seccomp", str(filtered)]
    return [*words, "--", str(place.guest), channel, "20"]


class Keeper:
    """One keeper; what it says is collected until somebody asks for it."""

    def __init__(
        self,
        place: Place,
        *options: str,
        monitor: Sequence[str] | None = None,
        pass_fds: Sequence[int] = (),
        jail: bool = True,
        files: Sequence[int] = (),
    ) -> None:
        self.place = place
        self.seen: list[frames.Frame] = []
        self.answers = True
        ours, theirs = socket.socketpair()
        self.channel = frames.Channel(ours)
        self.console = place.directory / "console.log"
        filtered = memory(seccomp_without_userns())
        argv = [*_jail(place), "--"] if jail else []
        argv += [str(place.shim), "keeper", "--ctl", str(theirs.fileno()), "--box", str(place.box)]
        argv += ["--console", str(self.console), "--console-bytes", "65536", "--patience", "120"]
        argv += ["--socket", "egress.sock", *options]
        if files:
            free = (number for number in range(5, 20) if number != theirs.fileno())  # the numbers of a plan's files
            pairs = [f"{fd}:{number}" for fd, number in zip(files, free, strict=False)]
            argv = [sys.executable, "-c", NUMBERED, *pairs, "--", *argv]
        self.process = subprocess.Popen(
            [*argv, "--", *(monitor if monitor is not None else machine(place, filtered))],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            pass_fds=[theirs.fileno(), filtered, *pass_fds, *files], **as_user(),
        )  # fmt: skip
        theirs.close()
        os.close(filtered)

    @property
    def pid(self) -> int:
        """The keeper itself: bubblewrap's only child."""
        return int(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()[0])

    def begin(self, *fields: str, tar: bytes = b"tar", inner: Sequence[str] = ()) -> list[str]:
        """Send `B`; return what the self-probe found."""
        self.send_begin(*fields, tar=tar, inner=inner)
        return [item.decode() for item in frames.decode_list(self.until("P"))[0]]

    def send_begin(self, *fields: str, tar: bytes = b"tar", inner: Sequence[str] = ()) -> None:
        """Send `B`, and do not wait."""
        words = [f"uid={os.getuid()}", "socket=egress.sock", *fields]
        argv = [str(self.place.guest), "inner", "--unit", "--ctl", "0", "--egress", "/run/cloister/box/egress.sock"]
        argv += ["--listen", "127.0.0.1:3128", "--probe-write", "/usr", "--probe-connect", "192.0.2.1:9", *inner]
        payload = b"".join(frames.encode_list(word.encode() for word in part) for part in (words, argv))
        carried = memory(tar, "tar")
        self.channel.send("B", payload, [carried])
        os.close(carried)

    def go(self, *command: str, stdio: Sequence[int] = (), flags: int = 0) -> None:
        """Send `G`, with these descriptors."""
        self.channel.send("G", frames.encode_u32(flags) + order(command, ENVIRONMENT, "/"), stdio)

    def execute(self, number: int, *command: str, stdio: Sequence[int] = (), flags: int = 0) -> None:
        """Send `X`, with these descriptors."""
        head = frames.encode_u32(number) + frames.encode_u32(flags)
        self.channel.send("X", head + order(command, ENVIRONMENT, "/"), stdio)

    def frame(self, kind: str, number: int | None = None, timeout_s: float = 20) -> frames.Frame:
        """Return the next frame of this type, and of this command where one is named."""
        head = b"" if number is None else frames.encode_u32(number)
        end = time.monotonic() + timeout_s
        while True:
            for index, frame in enumerate(self.seen):
                if frame.kind == kind and frame.payload.startswith(head):
                    return self.seen.pop(index)
            if time.monotonic() > end or not self.take():
                break
        raise AssertionError(f"no {kind}: {self.seen}, {self.process.poll()}, {self.said()}")

    def take(self) -> bool:
        """Take what has arrived; False when nothing will any more."""
        if self.channel.fileno() < 0:
            return False
        select.select([self.channel], [], [], 0.1)
        try:
            self.channel.flush()
            while frame := self.channel.receive():
                self.seen.append(frame)
                if frame.kind == "D" and self.answers:  # as the broker does when it has looked at the cgroup
                    self.channel.send("D")
        except frames.FrameError:
            self.channel.close()
        return True

    def until(self, kind: str, number: int | None = None, timeout_s: float = 20) -> bytes:
        """Return the payload of the next frame of this type."""
        return self.frame(kind, number, timeout_s).payload

    def ended(self, number: int = 0, timeout_s: float = 20) -> int:
        """Return the status with which a command ended."""
        return self.until("E", number, timeout_s)[4]

    def run(self, *command: str, data: bytes = b"", timeout_s: float = 20) -> tuple[int, bytes, bytes]:
        """Run the agent to its end: status, standard output, standard error."""
        self.begin()
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            given.write(data)
            given.seek(0)
            self.go(*command, stdio=[given.fileno(), out.fileno(), err.fileno()])
            status = self.ended(timeout_s=timeout_s)
            out.seek(0)
            err.seek(0)
            return status, out.read(), err.read()

    def over(self, timeout_s: float) -> int:
        """Wait until it is gone, hearing what it says meanwhile; return its exit code."""
        end = time.monotonic() + timeout_s
        while self.process.poll() is None and time.monotonic() < end and self.take():
            pass
        return self.process.wait(max(0.0, end - time.monotonic()))

    def died(self) -> dict[str, str]:
        """Return what the keeper says of a bad end."""
        items = frames.decode_list(self.until("D"))[0]
        return dict(item.decode().split("=", 1) for item in items)  # type: ignore[misc]

    def said(self) -> str:
        """Return the console so far."""
        return self.console.read_text(errors="replace") if self.console.exists() else ""

    def close(self) -> None:
        """End it, if it has not ended."""
        self.channel.close()
        self.process.kill()
        self.process.wait()
