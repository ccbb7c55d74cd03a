"""The posture ladder: the same three attacks without a sandbox, in the agent's own, hardened, and in Cloister.

    C1  read ~/secret-canary        C2  reach a private address (CGNAT)        C3  write outside the workspace

The private address belongs to a network namespace made for this (`private_network.py`), so no
packet reaches a real network. What counts is what the host sees: the canary's text in the
output, a connection at the listener, a file outside. A rung whose program is not installed
says so; it is not counted as anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Mapping
from typing import Any

import msgspec

from cloister.errors import UnsupportedError
from cloister.prove import private_network, workspaces
from cloister.prove.place import Place
from cloister.prove.session import PYTHON

CANARIES = ("C1", "C2", "C3")
WORDS = {"C1": "read ~/secret-canary", "C2": "reach a private address", "C3": "write outside the workspace"}
LIMIT_S = 40.0
_PROBE = """\
import os, socket, sys
secret, address, port, outside = sys.argv[1:5]
try: print(open(secret).read())
except OSError as error: print("C1", error)
def through(host, at):
    with socket.create_connection((host, at), timeout=2) as s:
        if host != address:
            s.sendall(f"CONNECT {address}:{port} HTTP/1.1\\r\\nHost: {address}:{port}\\r\\n\\r\\n".encode())
            print("C2 proxy", s.recv(200))
proxy = os.environ.get("HTTPS_PROXY", "").rpartition("//")[2].rpartition("@")[2].rstrip("/")
for host, at in [(address, int(port))] + ([(proxy.split(":")[0], int(proxy.split(":")[1]))] if ":" in proxy else []):
    try: through(host, at)
    except OSError as error: print("C2", host, error)
try: open(outside, "w").write("reached")
except OSError as error: print("C3", error)
print("probe-done")
"""


class Rung(msgspec.Struct, frozen=True):
    """One posture: which attacks got through, or why it could not be tried."""

    name: str
    reached: tuple[str, ...] = ()
    cannot_run: str = ""


def climb(agent: str, environ: Mapping[str, str]) -> list[Rung]:
    """Try every posture; return the rungs from the lowest up.

    Raises:
        UnsupportedError: `ladder-unit`: a unit of the system does not stand in a network namespace of ours.
        CloisterError: the policy is wrong, or no network namespace of our own can be made.
    """
    if Place(environ, agent).unit:
        raise UnsupportedError(
            "ladder-unit", f"{agent!r} is a unit of the system, outside of the namespaces of a ladder",
            where=f".agents.{agent}.isolation", remedy=f"cloister prove {agent}",
        )  # fmt: skip
    answer = private_network.inside(lambda: msgspec.json.encode(_climb(agent, environ)))
    return msgspec.json.decode(answer, type=list[Rung])


def _climb(agent: str, environ: Mapping[str, str]) -> list[Rung]:
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(Place(environ, agent))
        listener = stack.enter_context(socket.create_server((private_network.ADDRESS, 0)))
        listener.setblocking(False)
        ground = _Ground(place, workspaces.make(place.base, "project", "clone"), listener)
        stack.callback(ground.clean)
        own, hardened = _own_sandbox(place, environ)
        return [
            ground.attempt("bare", lambda words: words),
            own(ground),
            hardened(ground),
            ground.attempt("cloister", lambda words: place.command(ground.workspace, tuple(words))),
        ]


class _Ground:
    """The canaries, and one attempt after the other."""

    def __init__(self, place: Place, workspace: str, listener: socket.socket) -> None:
        self.place = place
        self.workspace = workspace
        self._listener = listener
        self._token = f"canary-{secrets.token_hex(16)}"
        self.secret = f"{place.home}/.secret-canary-{secrets.token_hex(4)}"
        self.outside = f"{place.base}/outside"
        with open(self.secret, "x", encoding="ascii") as file:
            file.write(self._token)

    def attempt(self, name: str, wrap: Any) -> Rung:
        """Run the probe in a posture, and look what it reached."""
        address, port = self._listener.getsockname()[:2]
        words = [PYTHON, "-I", "-S", "-c", _PROBE, self.secret, address, str(port), self.outside]
        try:
            done = subprocess.run(
                wrap(words), cwd=self.workspace, env=self.place.environment, stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True, errors="replace", timeout=LIMIT_S, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            return Rung(name, cannot_run=str(error)[:200])
        if "probe-done" not in done.stdout:
            return Rung(name, cannot_run=(done.stderr.strip() or f"exit {done.returncode}")[-200:])
        seen = {"C1": self._token in done.stdout, "C2": self._connected(), "C3": os.path.lexists(self.outside)}
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.outside)
        return Rung(name, tuple(canary for canary in CANARIES if seen[canary]))

    def _connected(self) -> bool:
        came = False
        with contextlib.suppress(BlockingIOError):
            while True:
                self._listener.accept()[0].close()
                came = True
        return came

    def clean(self) -> None:
        """Remove the canary."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.secret)


def _own_sandbox(place: Place, environ: Mapping[str, str]) -> tuple[Any, Any]:
    """Return the two rungs of the agent's own sandbox: Claude Code's is srt; Codex brings one as a command."""
    search = environ.get("PATH", os.defpath)
    srt, codex = shutil.which("srt", path=search), shutil.which("codex", path=search)
    if place.resolved.agent.preset == "codex" and codex:
        return (
            lambda ground: ground.attempt("codex's own sandbox", lambda words: [codex, "sandbox", "--", *words]),
            lambda _: Rung("hardened", cannot_run="codex has no setting that hides the home from its commands"),
        )
    if not srt:
        why = "srt is not installed (npm install -g @anthropic-ai/sandbox-runtime)"
        return (lambda _: Rung("the agent's own sandbox", cannot_run=why)), (lambda _: Rung("hardened", cannot_run=why))
    plain, hardened = _settings(place, []), _settings(place, [place.home])
    return (
        lambda ground: ground.attempt("srt (Claude Code's sandbox)", lambda words: [srt, "--settings", plain, *words]),
        lambda ground: ground.attempt("srt, hardened", lambda words: [srt, "--settings", hardened, *words]),
    )


def _settings(place: Place, deny_read: list[str]) -> str:
    """Write settings for srt; hardened ones deny reading the home."""
    path = f"{place.base}/srt-{len(deny_read)}.json"
    settings = {
        "network": {"allowedDomains": [], "deniedDomains": []},
        "filesystem": {"denyRead": deny_read, "allowWrite": ["."], "denyWrite": []},
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(settings, file)
    return path


def table(rungs: list[Rung]) -> str:
    """Return the ladder as text."""
    lines = [f"{'':30}" + "  ".join(f"{canary:8}" for canary in CANARIES)]
    for number, rung in enumerate(rungs):
        if rung.cannot_run:
            lines.append(f"{number:02} {rung.name:27}cannot run: {' '.join(rung.cannot_run.split())}")
        else:
            cells = "  ".join(f"{'REACHED' if canary in rung.reached else 'denied':8}" for canary in CANARIES)
            lines.append(f"{number:02} {rung.name:27}{cells}".rstrip())
    return "\n".join([*lines, "", *(f"{canary} {words}" for canary, words in WORDS.items())])


def exit_code(rungs: list[Rung]) -> int:
    """Return 0 when Cloister's rung denied everything and the bare one nothing; else the canaries prove nothing."""
    bare, cloister = rungs[0], rungs[-1]
    if cloister.cannot_run or bare.cannot_run or set(bare.reached) != set(CANARIES):
        return 69
    return 1 if cloister.reached else 0
