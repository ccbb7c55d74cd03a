"""A fake broker and a fake relay that drive the real, compiled shim inside real bubblewrap.

Not the product's broker: it does just enough of the protocol to put both halves to the test.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import shim_build
from cloister.host import frames

PTY, USERNS, NETNS = 1, 2, 4
TESTER = 4242
ENVIRONMENT = (b"PATH=/usr/bin:/bin", b"LANG=C.UTF-8")


def _bpf(code: int, jt: int, jf: int, k: int) -> bytes:
    return struct.pack("<HBBI", code, jt, jf, k)


def seccomp_without_userns() -> bytes:
    """Return a filter that refuses unshare(2) and allows the rest: the shim wants to see one."""
    unshare = {"x86_64": 272, "aarch64": 97}[os.uname().machine]
    return _bpf(0x20, 0, 0, 0) + _bpf(0x15, 0, 1, unshare) + _bpf(6, 0, 0, 0x00050001) + _bpf(6, 0, 0, 0x7FFF0000)


SECCOMP_ALLOW = _bpf(6, 0, 0, 0x7FFF0000)


class Relay:
    """Answers SOCKS greetings; else obeys a first line: `echo`, `count`, `source N`, `stall`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.connections = 0
        self.most = 0
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self._thread.start()
        started.wait(5)

    def close(self) -> None:
        """Stop answering and remove the socket."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self.path.unlink(missing_ok=True)

    def _serve(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_unix_server(self._answer, str(self.path), backlog=64))
        self.path.chmod(0o777)
        started.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.01))
        self._loop.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.most = max(self.most, self.connections)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await self._obey(reader, writer)
        self.connections -= 1
        writer.close()

    async def _obey(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.readexactly(1)
        if first == b"\x05":
            await reader.readexactly(2)
            writer.write(b"\x05\x00")
            await writer.drain()
            return
        words = (first + await reader.readline()).split()
        if words[0] == b"source":
            for _ in range(int(words[1]) // 65536):
                writer.write(bytes(65536))
                await writer.drain()
        elif words[0] == b"stall":
            await asyncio.sleep(3600)
        elif words[0] == b"count":
            total = 0
            while data := await reader.read(1 << 18):
                total += len(data)
            writer.write(str(total).encode())
            await writer.drain()
        else:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()


class Rig:
    """A directory for one test that the ordinary user can reach: shim, relay socket, a writable place."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="cloister-shim-", dir="/tmp"))
        self.directory.chmod(0o755)
        self.shim = self.directory / "cloister-shim"
        shutil.copy(shim_build.shim(), self.shim)
        self.work = self.directory / "work"
        self.work.mkdir()
        self.work.chmod(0o777)
        self.relay = Relay(self.directory / "egress.sock")

    def close(self) -> None:
        """Remove everything."""
        self.relay.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def rig_of_test() -> Iterator[Rig]:
    """Body of the `rig` fixture."""
    rig = Rig()
    try:
        yield rig
    finally:
        rig.close()


def as_user() -> dict[str, object]:
    """Popen arguments that turn root into the ordinary test user."""
    return {"user": TESTER, "group": TESTER, "extra_groups": []} if os.getuid() == 0 else {}


class Run:
    """One run: the outer half as a child, and the broker's ends of both channels."""

    def __init__(  # noqa: PLR0913 - every test bends one of them
        self,
        rig: Rig,
        *,
        options: Sequence[str] = (),
        flags: int = 0,
        bwrap: Sequence[str] = (),
        seccomp: bool = True,
        listen: bool = True,
        shim: Path | None = None,
        argv: Sequence[str] | None = None,
        overlays: Sequence[str] = (),
        nft: Sequence[str] = (),
        nft_text: bytes = b"",
        launch: bool = True,
        filter_text: bytes = b"",
        inherited: Sequence[int] = (),
        **popen: object,
    ) -> None:
        self.rig, self.flags = rig, flags
        self.probe: list[str] = []
        self.seen: list[tuple[str, str, bytes]] = []
        self.terminals: dict[bytes, frames.Channel] = {}
        self.status: int | None = None
        self.finish = True
        broker_outer, theirs = socket.socketpair()
        self.started = time.monotonic()
        defaults: dict[str, object] = {
            "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **as_user(),
        }  # fmt: skip
        self.process = subprocess.Popen(
            [str(shim or rig.shim), "outer", str(theirs.fileno())],
            pass_fds=[theirs.fileno(), *inherited],
            **{**defaults, **popen},
        )
        theirs.close()
        self.outer = frames.Channel(broker_outer)
        broker_inner, self._inner_end = socket.socketpair()
        self.inner = frames.Channel(broker_inner)
        inner = ["inner", "--ctl", "3", "--egress", str(rig.relay.path), "--probe-write", "/usr"]
        inner += ["--probe-connect", "192.0.2.1:9", *(["--listen", "127.0.0.1:3128"] if listen else []), *options]
        self._argv = list(argv) if argv is not None else [*self._bwrap(bwrap, seccomp=seccomp), str(rig.shim), *inner]
        self._filter_text = filter_text or seccomp_without_userns()
        self._overlays, self._nft, self._nft_text = overlays, nft, nft_text
        if launch:
            self.launch()

    def _bwrap(self, extra: Sequence[str], *, seccomp: bool) -> list[str]:
        base = "/usr/bin/bwrap --unshare-all --die-with-parent --as-pid-1 --ro-bind / / --proc /proc --dev /dev"
        work = str(self.rig.work)
        filtered = ["--seccomp", "4"] if seccomp else []
        return [*base.split(), "--bind", work, work, *filtered, "--cap-drop", "ALL", *extra, "--"]

    def launch(self) -> None:
        """Send `B`: the inner channel becomes descriptor 3, the seccomp filter 4, nft rules 5."""
        descriptors = [self._inner_end.fileno()]
        for text in (self._filter_text, self._nft_text):
            # Not a pipe: nft opens /dev/fd/5 anew, and a pipe made by root is closed to the ordinary user then.
            memory = os.memfd_create("text")
            os.write(memory, text)
            os.lseek(memory, 0, os.SEEK_SET)
            descriptors.append(memory)
        payload = frames.encode_u32(self.flags)
        for words in (self._argv, self._overlays, self._nft):
            payload += frames.encode_list(os.fsencode(word) for word in words)
        self.outer.send("B", payload, descriptors)
        for descriptor in descriptors[1:]:
            os.close(descriptor)
        self._inner_end.close()

    def go(self, *command: str, cwd: str = "/", environment: Sequence[bytes] = ENVIRONMENT) -> None:
        """Send `G`: start the agent."""
        self.inner.send("G", frames.encode_u32(self.flags & PTY) + order(command, environment, cwd))

    def execute(self, number: int, stdio: Sequence[int], *command: str, pty: bool = False) -> None:
        """Send `X`: one more command in the same sandbox."""
        head = frames.encode_u32(number) + frames.encode_u32(int(pty))
        self.inner.send("X", head + order(command, ENVIRONMENT, "/"), stdio)

    def turn(self, timeout_s: float = 0.1) -> None:
        """Do what a broker does with everything that has arrived."""
        channels = [channel for channel in (self.outer, self.inner) if channel.fileno() >= 0]
        ready, _, _ = select.select(channels, [], [], timeout_s)
        for channel in ready:
            name = "outer" if channel is self.outer else "inner"
            try:
                while frame := channel.receive():
                    self.seen.append((name, frame.kind, frame.payload))
                    self._on_frame(name, frame)
            except frames.FrameError:
                channel.close()
                self._on_closed(name)

    def _on_closed(self, name: str) -> None:
        other = self.inner if name == "outer" else self.outer
        if other.fileno() < 0:
            return
        with contextlib.suppress(frames.FrameError):
            if name == "outer":
                other.send("K")
            elif self.status is None and self._argv:
                self._end(125)

    def _end(self, code: int, text: bytes = b"") -> None:
        self.status = code
        if self.finish and self.outer.fileno() >= 0:
            self.outer.send("F", bytes([code]) + text)

    def _on_frame(self, name: str, frame: frames.Frame) -> None:
        if (name, frame.kind) == ("inner", "M"):
            terminal = self.terminals.get(frame.payload, self.outer)
            terminal.send("M", b"", frame.descriptors)
        for descriptor in frame.descriptors:
            os.close(descriptor)
        match name, frame.kind:
            case "outer", "M" if self._argv:
                self.inner.send("M", bytes(4))
            case "inner", "P":
                self.probe = [item.decode() for item in frames.decode_list(frame.payload)[0]]
            case "inner", "E" if frame.payload[:4] == bytes(4):
                self._end(frame.payload[4])
            case "inner", "Y" if frame.payload[:4] == bytes(4):
                error = frames.decode_u32(frame.payload, 4)[0]
                stage = frame.payload[8:]
                self._end(125 if stage != b"exec" else 127 if error == 2 else 126)
            case "inner", "Z":
                self.outer.send("T")
            case "outer", "S":
                self.inner.send("S", frame.payload)
            case "outer", "C":
                self.inner.send("S", bytes([signal.SIGCONT]))
            case _:
                pass

    def until(self, name: str, kind: str, timeout_s: float = 10) -> bytes:
        """Work until this side has sent such a frame; return its payload and forget it."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            for index, (side, seen, payload) in enumerate(self.seen):
                if (side, seen) == (name, kind):
                    del self.seen[index]
                    return payload
            self.turn()
        raise AssertionError(f"no {kind} from {name}: {self.seen} {self.probe} {self.process.poll()}")

    def wait(self, timeout_s: float = 15) -> int:
        """Work until the outer half has ended; return its exit code."""
        end = time.monotonic() + timeout_s
        while self.process.poll() is None and time.monotonic() < end:
            self.turn(0.02)
        return self.process.wait(0.1)

    def complete(self, *command: str, **go: object) -> tuple[int, bytes, bytes]:
        """Go, and return exit code, stdout and stderr of a run whose output fits into a pipe."""
        self.go(*command, **go)
        code = self.wait()
        out, err = self.process.communicate()
        self.close()
        return code, out or b"", err or b""

    def close(self) -> None:
        """End whatever is left."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.outer.close()
        self.inner.close()


def order(command: Sequence[str], environment: Sequence[bytes], cwd: str) -> bytes:
    """Return argv, environment and directory as `G` and `X` carry them."""
    words = frames.encode_list(os.fsencode(word) for word in command)
    return words + frames.encode_list(environment) + frames.encode_list([os.fsencode(cwd)])


def _parents() -> dict[int, tuple[int, str]]:
    """Return parent and start time of every process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] not in "ZX":
                    found[int(entry.name)] = (int(fields[1]), fields[19])
    return found


def family(pid: int) -> dict[int, str]:
    """Return a process and all its descendants as host pids, with their start times."""
    parents = _parents()
    members = {pid}
    while more := {child for child, (parent, _) in parents.items() if parent in members} - members:
        members |= more
    return {member: parents[member][1] for member in members if member in parents}


def wait_gone(members: dict[int, str], timeout_s: float = 5) -> set[int]:
    """Wait until none of these processes is left; return those that are."""
    end = time.monotonic() + timeout_s
    while True:
        now = _parents()
        left = {pid for pid, started in members.items() if pid in now and now[pid][1] == started}
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.01)
