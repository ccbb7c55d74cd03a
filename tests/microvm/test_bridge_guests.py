"""Two real guests on the bridge: each reaches its own run's proxy there, and not the other's. Root only.

The bridge is in namespaces of the test's own (`support.bridge_host`); brokers and guests are in them too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from microvm.conftest import GuestImage
from support.guest_user import GuestUser
from support.homes import make_home, make_workspace

pytestmark = [pytest.mark.root, pytest.mark.slow]
TESTS = Path(__file__).parents[1]
UID = os.stat(sys.prefix).st_uid
CONNECTED = '[agents.shell.microvm]\nnetwork = "bridge"\n'
ASKS = "GET http://blocked.invalid/ HTTP/1.1\r\nHost: blocked.invalid\r\n\r\n"
PROBE = f"""
import json, socket, sys
def attempt(address, port):
    try:
        with socket.create_connection((address, port), 3) as sock:
            sock.sendall({ASKS.encode()!r})
            return sock.recv(4096).split(b"\\r\\n")[0].decode()
    except OSError as error:
        return type(error).__name__
print(json.dumps([attempt(*one) for one in json.loads(sys.argv[1])]))
"""


class Connected(GuestUser):
    """A user whose program runs where the bridge is."""

    pid = 0
    place = Path("/")

    def command(self, *words: str) -> list[str]:
        """Return the argv of `cloister WORDS` in the host's namespaces."""
        enter = ["nsenter", f"--target={self.pid}", "--net", "--mount", f"--wdns={self.place}", "--"]
        return [*enter, "setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", *super().command(*words)]

    def run(self, *words: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run `cloister WORDS` there, to its end."""
        self.place = cwd
        return super().run(*words, cwd=cwd, **options)


def inside(pid: int, *words: str) -> str:
    """Run a program where the bridge is."""
    done = subprocess.run(["nsenter", f"--target={pid}", "--net", "--mount", "--", *words],
                          capture_output=True, text=True, check=True)  # fmt: skip
    return done.stdout


@pytest.fixture
def host() -> Iterator[int]:
    """The process id of a host with a bridge, whose user may be on it."""
    words = ["unshare", "--net", "--mount", sys.executable, "-m", "support.bridge_host", str(UID)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=TESTS, text=True) as serving:
        assert serving.stdout
        assert serving.stdin
        assert serving.stdout.readline() == "ready\n"
        yield serving.pid
        serving.stdin.close()


@pytest.fixture
def user(host: int, image: GuestImage) -> Iterator[Connected]:
    """Whoever the installed program belongs to, with the image of the tests in a home of their own."""
    place = Path(tempfile.mkdtemp(prefix="cl-home-", dir="/tmp"))
    place.chmod(0o755)
    made = Connected(make_home(place / "home"), image, CONNECTED)
    kept = made.home / ".local/share/cloister/images" / image.name
    kept.unlink()  # a link into a directory that is root's
    shutil.copytree(image.store / image.name, kept)
    made.pid = host
    made.environment |= {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}  # from the sources
    for folder in (made.home, made.runtime):
        subprocess.run(["chown", "--recursive", "--no-dereference", f"{UID}:{UID}", folder], check=True)
    yield made
    made.close()
    shutil.rmtree(place)


def taps(host: int) -> dict[str, Any]:
    """Return what is recorded, by run."""
    found = inside(host, "sh", "-c", "cat /run/cloister/bridge/taps/* 2>/dev/null || true").replace("}{", "}\n{")
    return {one["run"]: one for one in map(json.loads, found.splitlines())}


def test_two_guests_reach_their_own_proxies_only(host: int, user: Connected) -> None:
    """From inside: eth0 leads to the run's own proxy, over the bridge as over the channel; not to the other's."""
    workspace, other_workspace = (make_workspace(user.home / f"src/{name}") for name in ("project", "other"))
    subprocess.run(["chown", "--recursive", f"{UID}:{UID}", user.home / "src"], check=True)
    run, other = user.begin(cwd=workspace), user.begin(cwd=other_workspace)
    there = taps(host)
    own, foreign = there[run], there[other]
    targets = [
        [own["gateway"], own["port"]], ["127.0.0.1", 3128],
        [foreign["gateway"], foreign["port"]], [foreign["address"], 22], [own["gateway"], 22], ["192.0.2.1", 80],
    ]  # fmt: skip

    script = f"cat /sys/class/net/eth0/address; echo $CLOISTER_BRIDGE_PROXY; python3 - '{json.dumps(targets)}'"
    done = user.exec(run, script, cwd=workspace, stdin=PROBE.encode())

    assert done.returncode == 0, done.stderr
    mac, proxy, said = done.stdout.splitlines()
    assert proxy == f"http://{own['gateway']}:{own['port']}"
    assert mac == own["mac"] != foreign["mac"]
    answers = json.loads(said)
    assert answers[0] == answers[1] == "HTTP/1.1 403 Forbidden"
    assert set(answers[2:]) <= {"TimeoutError", "OSError"}
    denied = [event for event in user.run("logs", "--events", "--json", run, cwd=workspace).stdout.splitlines()
              if "blocked.invalid" in event]  # fmt: skip
    assert len(denied) == 2, "by each way once"

    for one in (run, other):
        user.run("stop", one, cwd=workspace)
    assert taps(host) == {}
    assert "clvm" not in inside(host, "ip", "link")
