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
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloister.host import qmp
from microvm.conftest import GuestImage
from support.guest_user import BOOT_S, GuestUser
from support.homes import make_home, make_workspace

pytestmark = pytest.mark.root
TESTS = Path(__file__).parents[1]
UID = os.stat(sys.prefix).st_uid
PATIENCE_S = 30
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
    kept.unlink() if kept.is_symlink() else shutil.rmtree(kept)  # links to files that are root's, and everybody's
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


def connected(host: int, count: int) -> set[str]:
    """Return whose guests are on the bridge, when there are so many, or never come to be."""
    until = time.monotonic() + PATIENCE_S
    while len(found := set(taps(host))) != count and time.monotonic() < until:
        time.sleep(0.2)
    return found


def refused(host: int) -> int:
    """Return how many frames of guests the packet filter has refused."""
    words = inside(host, "nft", "list", "counter", "bridge", "cloister_vm", "from_guests").split()
    return int(words[words.index("packets") + 1])


def card(user: Connected, run: str) -> str:
    """Return the MAC that a run's monitor knows its guest by: that of the device's configuration space."""
    (path,) = user.runtime.glob(f"**/runs/{run}/vm/qmp.sock")
    monitor = qmp.connect(str(path))
    try:
        (found,) = monitor.call("query-rx-filter")
        return str(found["main-mac"])
    finally:
        monitor.close()


def make_template(user: Connected) -> None:
    """Have the agent's runs start from a template, and make it."""
    policy = user.home / ".config/cloister/cloister.toml"
    policy.write_text(policy.read_text().replace("warm = false", "warm = true"))
    done = user.run("vm", "warm", "shell", cwd=user.home, timeout_s=BOOT_S)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "warm", [pytest.param(False, id="boots"), pytest.param(True, id="template", marks=pytest.mark.slow)]
)
def test_two_guests_reach_their_own_proxies_only(host: int, user: Connected, warm: bool) -> None:
    """From inside: eth0 leads to the run's own proxy, over the bridge as over the channel; not to the other's.

    So it is for guests that started from one template, which has a card without a wire and nobody's address: each has
    the MAC and the address of its run, and neither a guest nor its monitor ever speaks under another.
    """
    if warm:
        make_template(user)
    workspace, other_workspace = (make_workspace(user.home / f"src/{name}") for name in ("project", "other"))
    subprocess.run(["chown", "--recursive", f"{UID}:{UID}", user.home / "src"], check=True)
    run, other = user.begin(cwd=workspace), user.begin(cwd=other_workspace)
    there = taps(host)
    own, foreign = there[run], there[other]
    plans = [json.loads((user.state / f"runs/{one}/plan.json").read_text()) for one in (run, other)]
    assert [bool(plan["steps"][-1]["vm"]["template"]) for plan in plans] == [warm, warm]
    assert [card(user, one) for one in (run, other)] == [own["mac"], foreign["mac"]]
    assert own["address"] != foreign["address"]
    assert refused(host) == 0, "neither guest has said anything that is not its own"
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

    monitors = inside(host, "pgrep", "-f", f"virtio-net-device,netdev=net,mac={mac}").split()
    inside(host, "kill", "-KILL", *monitors)
    assert connected(host, 1) == {other}
    user.run("stop", other, cwd=workspace)
    assert connected(host, 0) == set()
    assert "clvm" not in inside(host, "ip", "link")
