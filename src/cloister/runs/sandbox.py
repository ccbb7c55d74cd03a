"""The Python API: a sandbox that stays up, and commands run in it.

    from cloister import Sandbox

    with Sandbox("shell", directory="~/src/project") as box:
        done = box.run(["pytest", "-q"], timeout_s=600)
        print(done.returncode, done.stdout.decode())

All commands of one `Sandbox` share one run: its policy, workspace, home and receipt. They see
what earlier ones left in `/tmp` and the home. For a fresh sandbox per command, make a fresh
`Sandbox`. Commands may run at the same time, from several threads.
"""

from __future__ import annotations

import _socket
import os
import select
import subprocess
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from cloister.errors import CloisterError, UsageError
from cloister.runs import client
from cloister.runs.paths import locate
from cloister.runs.store import Receipt, Store, new_id

_HOLD = ["sleep", "infinity"]
"""What the run itself does while commands come and go: GNU sleep, coreutils(1)."""
_CHUNK = 1 << 16


class Sandbox:
    """One run that waits for commands. Use it as a context manager, or call `close`."""

    def __init__(self, agent: str = "shell", *, directory: str = ".", profile: str = "") -> None:
        """Start the sandbox of `agent` for the project that `directory` is in.

        Raises:
            CloisterError: the policy, the host or the directory does not allow it.
        """
        self.run_id = new_id(time.time())
        self._directory = os.path.abspath(os.path.expanduser(directory))
        self._process: subprocess.Popen[bytes] | None = self._start(agent, profile)

    def __enter__(self) -> Self:
        """Return the sandbox itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the run."""
        self.close()

    def run(
        self, argv: Sequence[str], *, input: bytes = b"", directory: str = "", timeout_s: float | None = None,  # noqa: A002  as in subprocess
        check: bool = False,
    ) -> subprocess.CompletedProcess[bytes]:  # fmt: skip
        """Run a command inside and return its exit code and output, as `subprocess.run` does.

        Args:
            argv: program and arguments; the program is looked up inside.
            input: what the command reads on standard input.
            directory: where it starts, a path inside; the workspace when empty.
            timeout_s: seconds after which it is killed.
            check: raise when the exit code is not 0.

        Raises:
            subprocess.TimeoutExpired: the time is over; the command was killed.
            subprocess.CalledProcessError: `check`, and the exit code is not 0.
            CloisterError: the sandbox has ended.
        """
        if isinstance(argv, str) or not argv:
            raise UsageError("command-invalid", "a command is a list of program and arguments")
        call = _Call(self.run_id, list(argv), directory, input)
        try:
            code, out, err = call.finish(timeout_s)
        except TimeoutError:
            raise subprocess.TimeoutExpired(list(argv), timeout_s or 0, call.out, call.err) from None
        finally:
            call.close()
        done = subprocess.CompletedProcess(list(argv), code, out, err)
        if check:
            done.check_returncode()
        return done

    def close(self) -> Receipt | None:
        """End the run and everything in it; return its receipt."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return Store(locate(os.environ, client.home(), os.getuid()).runs).receipt(self.run_id)

    def _start(self, agent: str, profile: str) -> subprocess.Popen[bytes]:
        fields = {"verb": "run", "agent": agent, "replaced": "1", "directory": self._directory, "profile": profile,
                  "id": self.run_id, "yes": "1"}  # fmt: skip
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            connection = client.request(fields, _HOLD, (null, null, null))
        finally:
            os.close(null)
        descriptor = connection.detach()
        try:
            process = subprocess.Popen(
                [client.SHIM, "outer", str(descriptor)], pass_fds=(descriptor,), stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={},
            )  # fmt: skip
        finally:
            os.close(descriptor)
        self._probe(process)
        return process

    def _probe(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until a command runs: a start that failed has its reason on stderr."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if process.poll() is not None:
                assert process.stderr is not None  # noqa: S101  # a pipe was asked for
                text = process.stderr.read().decode("utf-8", "replace").strip()
                raise CloisterError(
                    "sandbox-not-started", text.removeprefix("cloister: ") or "the sandbox did not start"
                )
            try:
                self.run(["true"])
            except CloisterError:
                time.sleep(0.005)
                continue
            return
        process.kill()
        raise CloisterError("sandbox-not-started", "the sandbox did not come up within 30 s", remedy="cloister doctor")


class _Call:
    """One command in a running sandbox: three pipes and the connection that brings its exit code."""

    def __init__(self, run: str, argv: list[str], directory: str, data: bytes) -> None:
        self.out = b""
        self.err = b""
        self._left = memoryview(data)
        self._answer = b""
        inside_in, self._in = os.pipe2(os.O_CLOEXEC)
        self._out, inside_out = os.pipe2(os.O_CLOEXEC)
        self._err, inside_err = os.pipe2(os.O_CLOEXEC)
        try:
            fields = {"verb": "exec", "run": run, "directory": directory}
            self._connection: _socket.socket | None = client.request(fields, argv, (inside_in, inside_out, inside_err))
        except BaseException:
            self._connection = None
            self.close()
            raise
        finally:
            for descriptor in (inside_in, inside_out, inside_err):
                os.close(descriptor)
        os.set_blocking(self._in, False)

    def finish(self, timeout_s: float | None) -> tuple[int, bytes, bytes]:
        """Feed and read until all pipes are closed and the exit code is there.

        Raises:
            TimeoutError: the time is over.
            CloisterError: the run is over, or the broker is gone.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        outputs: dict[int, list[bytes]] = {self._out: [], self._err: []}
        try:
            self._loop(outputs, deadline)
        finally:
            self.out, self.err = b"".join(outputs[self._out]), b"".join(outputs[self._err])
        code, text = self._answer[client.HEADER], self._answer[client.HEADER + 1 :].decode("utf-8", "replace")
        if text:
            reference = text.strip().rpartition("[")[2].split("]")[0]
            raise CloisterError(reference, text.split("\n")[0].removeprefix("cloister: ").rpartition(" [")[0])
        return code, self.out, self.err

    def _loop(self, outputs: dict[int, list[bytes]], deadline: float | None) -> None:
        assert self._connection is not None  # noqa: S101  # made by __init__
        poll = select.poll()
        control = self._connection.fileno()
        for descriptor in (self._out, self._err, control):
            poll.register(descriptor, select.POLLIN)
        if self._left:
            poll.register(self._in, select.POLLOUT)
        else:
            self._close_input()
        open_now = {self._out, self._err, control}
        while open_now:
            left_ms = None if deadline is None else max(0, int((deadline - time.monotonic()) * 1000))
            ready = poll.poll(left_ms)
            if not ready:
                raise TimeoutError
            for descriptor, _ in ready:
                if descriptor == self._in:
                    self._feed(poll)
                elif not self._read(descriptor, control, outputs):
                    poll.unregister(descriptor)
                    open_now.discard(descriptor)

    def _read(self, descriptor: int, control: int, outputs: dict[int, list[bytes]]) -> bool:
        """Read once; return False at the end of this stream."""
        if descriptor == control:
            data = os.read(control, _CHUNK)
            if not data:
                raise CloisterError("broker-gone", "the broker went away", remedy="start the sandbox again")
            self._answer += data
            return len(self._answer) <= client.HEADER or len(self._answer) < client.HEADER + int.from_bytes(
                self._answer[:4], "little"
            )
        data = os.read(descriptor, _CHUNK)
        outputs[descriptor].append(data)
        return bool(data)

    def _feed(self, poll: select.poll) -> None:
        try:
            self._left = self._left[os.write(self._in, self._left[:_CHUNK]) :]
        except BrokenPipeError:  # the command does not read: its business
            self._left = memoryview(b"")
        except BlockingIOError:
            return
        if not self._left:
            poll.unregister(self._in)
            self._close_input()

    def _close_input(self) -> None:
        if self._in >= 0:
            os.close(self._in)
            self._in = -1

    def close(self) -> None:
        """Close everything; a command that still runs is killed by that."""
        self._close_input()
        for descriptor in (self._out, self._err):
            os.close(descriptor)
        if self._connection is not None:
            self._connection.close()
            self._connection = None
