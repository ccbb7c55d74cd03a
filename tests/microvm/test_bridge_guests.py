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

HOLDS = f"""
import os, select, socket, time, urllib.parse
proxy = urllib.parse.urlsplit(os.environ["CLOISTER_BRIDGE_PROXY"])
def tell(word):
    with open("/tmp/said.new", "w") as file:
        file.write(word)
    os.rename("/tmp/said.new", "/tmp/said")
held = []
for number in range(20):
    sock = socket.socket(socket.AF_INET6 if number % 2 else socket.AF_INET)
    sock.connect(("::ffff:" * (number % 2) + proxy.hostname, proxy.port))
    for level, option in ((socket.SOL_SOCKET, socket.SO_KEEPALIVE), (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                          (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)):
        sock.setsockopt(level, option, 1)
    held.append(sock)
    time.sleep(0.05)
tell("connected")
asked = False
heard = set()
while held:
    for sock in select.select(held, (), (), 0.2)[0]:
        held.remove(sock)
        try:
            heard.add(sock.recv(4096).split(b"\\r\\n")[0].decode() or "closed")
        except OSError as error:
            heard.add(type(error).__name__)
    if os.path.exists("/tmp/ask") and not asked:
        asked = [sock.send({ASKS.encode()!r}) for sock in held]
tell(" ".join(sorted(heard)))
time.sleep(600)
"""
"""Holds connections over the bridge, and tells what they hear: an answer, an end, or an error.

The kernel says each second on behalf of each that it is there, whether processes stand still or not.
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


def said(user: Connected, run: str, cwd: Path, *awaited: str) -> str:
    """Return what the program that holds a connection has said, when that is one of these, or never comes to be."""
    until = time.monotonic() + PATIENCE_S
    while (word := user.exec(run, "cat /tmp/said", cwd=cwd).stdout) not in awaited and time.monotonic() < until:
        time.sleep(0.2)
    return word


def restored(user: Connected, cwd: Path) -> str:
    """Return the id of a run that goes on from the memory of the test's snapshot."""
    done = user.run("vm", "restore", "one", cwd=cwd, timeout_s=BOOT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_guest_with_a_card_goes_on_from_its_memory(host: int, user: Connected) -> None:
    """Another run's card, address and way out, and never a frame under the name of the first, whose connection lives.

    Whoever waited for an answer over the bridge in the one that goes on is told at once that there will be none. It
    is so while the first one lives, and when it has gone.
    """
    cwd = make_workspace(user.home / "src/project")
    (cwd / "holds.py").write_text(HOLDS)
    subprocess.run(["chown", "--recursive", f"{UID}:{UID}", user.home / "src"], check=True)
    run = user.begin("exec python3 holds.py", cwd=cwd)
    assert said(user, run, cwd, "connected") == "connected"

    kept = json.loads(user.run("vm", "snapshot", run, "one", "--json", cwd=cwd, timeout_s=BOOT_S).stdout)
    other = restored(user, cwd)

    assert (kept["memory"], kept["why"]) == (True, "")
    own, foreign = taps(host)[other], taps(host)[run]
    assert card(user, other) == own["mac"] != foreign["mac"] == card(user, run)
    assert said(user, other, cwd, "ConnectionAbortedError") == "ConnectionAbortedError"
    user.exec(run, "touch /tmp/ask", cwd=cwd)
    assert said(user, run, cwd, "HTTP/1.1 403 Forbidden") == "HTTP/1.1 403 Forbidden"
    assert refused(host) == 0, "neither guest has said anything that is not its own"
    targets = [[own["gateway"], own["port"]], [foreign["gateway"], foreign["port"]], [foreign["address"], 22]]
    script = f"cat /sys/class/net/eth0/address; echo $CLOISTER_BRIDGE_PROXY; python3 - '{json.dumps(targets)}'"
    mac, proxy, found = user.exec(other, script, cwd=cwd, stdin=PROBE.encode()).stdout.splitlines()
    assert (mac, proxy) == (own["mac"], f"http://{own['gateway']}:{own['port']}")
    answers = json.loads(found)
    assert answers[0] == "HTTP/1.1 403 Forbidden"
    assert set(answers[1:]) <= {"TimeoutError", "OSError"}

    user.run("stop", "--all", "--grace", "1s", cwd=cwd, timeout_s=BOOT_S)
    assert connected(host, 0) == set()
    third = restored(user, cwd)
    assert connected(host, 1) == {third}
    assert said(user, third, cwd, "ConnectionAbortedError") == "ConnectionAbortedError"
