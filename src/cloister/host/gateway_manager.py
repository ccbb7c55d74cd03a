"""Starting, stopping and asking gateways: systemctl(1), journalctl(1), and a question to the gateway's own port.

Acts on units by name and decides nothing: which ones, and who may, is for the callers.
"""

from __future__ import annotations

import http.client
import json
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from cloister.errors import StepError
from cloister.host import programs

_ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "SYSTEMD_COLORS": "0",
    "SYSTEMD_PAGER": "",
}
STOP_S = 360.0
"""OpenClaw may take 330 s to finish what it is at (TimeoutStopSec=)."""


def manage(verb: str, units: Iterable[str]) -> None:
    """Have systemd start, stop or restart units, and wait until that is done.

    Raises:
        StepError: `gateway-failed`, with what systemd said and where to read on.
    """
    names = tuple(units)
    if verb != "stop":
        _systemctl("reset-failed", names)  # somebody asks: what failed before does not count against it
    if complaint := _systemctl(verb, names):
        raise StepError("gateway-failed", f"systemctl {verb}: {complaint}", remedy=f"journalctl -u {names[-1]}")


def _systemctl(verb: str, names: tuple[str, ...]) -> str:
    """Do it; return what systemd complains about."""
    path = programs.find("systemctl", "").path or "/usr/bin/systemctl"
    try:
        done = subprocess.run(
            [path, "--no-ask-password", verb, "--", *names], env=_ENVIRONMENT, cwd="/", stdin=subprocess.DEVNULL,
            capture_output=True, text=True, errors="replace", timeout=STOP_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return next(iter(done.stderr.strip().splitlines()), verb) if done.returncode else ""


def show_journal(units: Iterable[str], *, follow: bool, lines: int) -> int:
    """Print what units wrote to the journal, and go on where `follow` says so; return journalctl's exit code."""
    path = programs.find("journalctl", "").path or "/usr/bin/journalctl"
    words = [path, *(f"--unit={unit}" for unit in units), "--output", "short-iso", "--lines", str(lines), "--no-pager"]
    return subprocess.run([*words, *(["--follow"] if follow else [])], env=_ENVIRONMENT, check=False).returncode


def round_trip(port: int, secret: str, timeout_s: float) -> str:
    """Return an empty text where a gateway answers one small question through its model, else why it does not.

    That a unit is active, or that `/readyz` says so, proves less: OpenClaw reports ready without a usable model.
    """
    body = {"model": "openclaw", "messages": [{"role": "user", "content": "Answer with the word: ready"}]}
    headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}
    try:
        with _connection(port, timeout_s) as connection:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            answer = connection.getresponse()
            data = answer.read(1 << 20)
    except (OSError, http.client.HTTPException) as error:
        return f"does not answer ({type(error).__name__})"
    if answer.status != http.HTTPStatus.OK:
        return f"answers {answer.status}"
    try:
        said = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return "answers, but not with a message"
    return "" if said else "answers with nothing"


def question(port: int, path: str, timeout_s: float) -> str:
    """Return an empty text where a program answers this path with success, else why it does not."""
    try:
        with _connection(port, timeout_s) as connection:
            connection.request("GET", path)
            status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return f"does not answer ({type(error).__name__})"
    return "" if status // 100 == 2 else f"answers {status}"  # noqa: PLR2004  # success (RFC 9110, section 15.3)


@contextmanager
def _connection(port: int, timeout_s: float) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        yield connection
    finally:
        connection.close()
