"""One run with the driver in it, seen from the host: start, one case after the other, end.

The run is started by a command line, so it is the same run that a user starts. Which command
line that is, is the caller's to say: `cloister run ...` for a battery, another one for tests
that a weak sandbox is found out.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

PYTHON = "/usr/bin/python3"
START_S = 40.0
_BOOT = (
    "import sys,json;m=json.loads(sys.stdin.readline());exec(compile(m['driver'],'driver','exec'),globals());begin(m)"
)
COMMAND = (PYTHON, "-I", "-S", "-B", "-c", _BOOT)
"""What is run in the sandbox; the rest comes through standard input."""
MODULES = ("support", "clients", "asking")
"""What cases import, in the order in which they need each other."""
_INSIDE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "inside")


class SessionError(Exception):
    """The run did not start, or ended too early; the text is its own last words."""


class Session:
    """A run under way; use as a context manager."""

    def __init__(
        self, argv: Sequence[str], directory: str, environment: Mapping[str, str], descriptors: Sequence[int] = ()
    ) -> None:
        """Start `argv` in `directory`. `descriptors` are left open in it: what leaks is the sandbox's fault.

        Raises:
            SessionError: it did not come up.
        """
        self._process = subprocess.Popen(
            list(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=directory,
            env=dict(environment), pass_fds=tuple(descriptors), bufsize=0, start_new_session=True,
        )  # fmt: skip
        self._data = b""
        self.pid = self._process.pid
        try:
            self._send({name: _text(f"{name}.py") for name in ("driver", *MODULES)})
            self._receive(START_S)
        except SessionError:
            self.end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Have one case run; return the driver's answer.

        Raises:
            SessionError: the run is over.
        """
        self._send(request)
        return self._receive(float(request["limit_s"]) + 10.0)

    def end(self) -> int:
        """Close the input, so that the driver ends and the run with it; return the exit code."""
        with contextlib.suppress(OSError):
            if self._process.stdin:
                self._process.stdin.close()
        try:
            self._process.wait(timeout=15.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
        code = self._process.wait()
        for stream in (self._process.stdout, self._process.stderr):
            if stream:
                stream.close()
        return code

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None  # noqa: S101  # a pipe, as asked for above
        try:
            data = json.dumps(message).encode() + b"\n"
            while data:
                data = data[self._process.stdin.write(data) or 0 :]
        except OSError as error:
            raise SessionError(self._last_words()) from error

    def _receive(self, limit_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None  # noqa: S101  # a pipe, as asked for above
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._data:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise SessionError(f"no answer within {limit_s:g} s")
            chunk = os.read(self._process.stdout.fileno(), 1 << 16)
            if not chunk:
                raise SessionError(self._last_words())
            self._data += chunk
        line, _, self._data = self._data.partition(b"\n")
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise SessionError(f"not an answer: {line[:200]!r}") from error
        return answer

    def _last_words(self) -> str:
        assert self._process.stderr is not None  # noqa: S101  # a pipe, as asked for above
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5.0)
        ready = select.select([self._process.stderr], [], [], 0.2)[0]
        text = os.read(self._process.stderr.fileno(), 4096).decode("utf-8", "replace").strip() if ready else ""
        return text or f"the run ended with {self._process.poll()}"


def bootstrap(request: Mapping[str, Any], start: str, end: str) -> str:
    """Return a program that runs one request without any input and prints the answer between two marks."""
    return (
        f"import json\nexec(compile({_text('driver.py')!r},'driver','exec'),globals())\n"
        f"install_all({ {name: _text(f'{name}.py') for name in MODULES}!r})\n"
        f"print({start!r}+json.dumps(judge(json.loads({json.dumps(request)!r})))+{end!r})\n"
    )


def answer_in(text: str, start: str, end: str) -> dict[str, Any]:
    """Return the answer that such a program printed between its marks; nothing where there is none."""
    first, last = text.find(start), text.rfind(end)
    if first < 0 or last < first:
        return {}
    answer: dict[str, Any] = json.loads(text[first + len(start) : last])
    return answer


def _text(name: str) -> str:
    with open(os.path.join(_INSIDE, name), encoding="utf-8") as file:
        return file.read()
