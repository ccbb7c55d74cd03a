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
    path = programs.find("systemctl", "").path or "/usr/bin/systemctl"
    try:
        done = subprocess.run(
            [path, "--no-ask-password", verb, "--", *names], env=_ENVIRONMENT, cwd="/", stdin=subprocess.DEVNULL,
            capture_output=True, text=True, errors="replace", timeout=STOP_S, check=False,
        )  # fmt: skip
        complaint = done.stderr.strip().splitlines()[:1] if done.returncode else []
    except (OSError, subprocess.TimeoutExpired) as error:
        complaint = [str(error)]
    if complaint:
        raise StepError("gateway-failed", f"systemctl {verb}: {complaint[0]}", remedy=f"journalctl -u {names[-1]}")


def show_journal(unit: str, *, follow: bool, lines: int) -> int:
    """Print what a unit wrote to the journal, and go on where `follow` says so; return journalctl's exit code."""
    path = programs.find("journalctl", "").path or "/usr/bin/journalctl"
    words = [path, "--unit", unit, "--output", "short-iso", "--lines", str(lines), "--no-pager"]
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


@contextmanager
def _connection(port: int, timeout_s: float) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        yield connection
    finally:
        connection.close()
