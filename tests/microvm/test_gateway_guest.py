"""OpenClaw's gateway in a guest of its shipped image, as a person starts it: its port is here, its key is not there.

The client is OpenClaw as well, on this host: it speaks the gateway's own protocol over its WebSocket. Where guests are
emulated, a start takes minutes, nearly all of them Node's.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from microvm.conftest import GuestImage
from support.bound import keep
from support.cloister import User
from support.fake_model import FakeModel
from support.guest_user import BOOT_S
from support.homes import make_home, make_workspace

pytestmark = [pytest.mark.slow, pytest.mark.agents, pytest.mark.timeout(3600)]
PORT = 18789
START_S = 1500
ANSWER_S = 900
KEY = "made-up-upstream-key-5"
_SLOW = "state lease heartbeat did not become ready"
"""Where the gateway ends at its start, for the machine is slow: emulated, that thread takes 6 s of a processor."""
POLICY = """\
schema = 1

[providers.anthropic]
base_url = "{url}"
key = "{key}"

[agents.claw]
preset = "openclaw"
isolation = "microvm"
command = ["openclaw-gateway"]
environment_audit = false

[agents.claw.microvm]
memory = "2G"
cpus = 2
ports = [18789]

[agents.claw.llm]
providers = ["anthropic"]
models = ["fake-1"]
"""


class Gateway:
    """A user with a gateway in a guest, the model that it asks, and a client on this host."""

    def __init__(self, image: GuestImage, place: Path, agents: Path, model: FakeModel) -> None:
        """Install image and policy; start nothing."""
        self.model, self.agents = model, agents
        self.image = f"{image.name} {image.manifest.version}"
        self.home = make_home(place / "home")
        self.workspace = make_workspace(self.home / "src/project")
        self.client = place / "client"
        self.client.mkdir()
        self.user = User(self.home)
        self.user.write_policy(POLICY.format(url=model.url, key=keep(self.user, KEY, "model.key")))
        image.install(self.home)

    def cloister(self, *words: str, timeout_s: float = BOOT_S) -> subprocess.CompletedProcess[str]:
        """Run `cloister WORDS` in the project."""
        return self.user.run(*words, cwd=self.workspace, timeout_s=timeout_s)

    def inside(self, script: str) -> str:
        """Return what a shell script prints in the guest."""
        done = self.cloister("vm", "exec", "claw", "--", "/bin/sh", "-c", script)
        return done.stdout + done.stderr

    def start(self) -> None:
        """Start the machine, and wait until its gateway says that it is ready; once more where it was too slow."""
        if not any(self._came_up() for _ in range(2)):
            pytest.skip(f"OpenClaw gives a thread of its own 5 s to start, and it took longer: {_SLOW}")

    def _came_up(self) -> bool:
        started = self.cloister("vm", "start", "claw")
        assert started.returncode == 0, started.stderr
        until = time.monotonic() + START_S
        while self.get("/readyz") != 200:
            assert time.monotonic() < until, self.logs()
            if not self.cloister("vm", "list", "--quiet").stdout:
                assert _SLOW in self.logs(), self.logs()
                return False
            time.sleep(2)
        return True

    def logs(self) -> str:
        """Return what the gateway printed."""
        return self.cloister("logs", "last").stdout[-20_000:]

    @staticmethod
    def get(path: str) -> int:
        """Return the status with which the port answers a request; 0 for none."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}{path}", timeout=60) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    @property
    def token(self) -> str:
        """The token that the gateway has made for itself."""
        return self.inside("cat ~/.openclaw/gateway-token").strip()

    def call(self, *words: str, token: str) -> subprocess.CompletedProcess[str]:
        """Run OpenClaw's client on this host against the port, with a token."""
        remote = {"url": f"ws://127.0.0.1:{PORT}", "token": token}
        config = self.client / ".openclaw/openclaw.json"
        config.parent.mkdir(exist_ok=True)
        config.write_text(json.dumps({"gateway": {"mode": "remote", "remote": remote}}))
        path = f"{self.agents}:/usr/bin:/bin"
        environment = {"HOME": str(self.client), "PATH": path, "TMPDIR": str(self.client), "LANG": "C.UTF-8"}
        return subprocess.run(
            [self.agents / "openclaw", *words], env=environment, capture_output=True, text=True, timeout=ANSWER_S,
            check=False, cwd=self.client, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def ask(self, message: str, token: str) -> subprocess.CompletedProcess[str]:
        """Ask the agent behind the gateway."""
        words = ["--agent", "main", "--message", message, "--timeout", str(ANSWER_S)]
        return self.call("agent", *words, token=token)


@pytest.fixture(scope="module")
def up(
    shipped: Callable[[str], GuestImage], agents_bin: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """The gateway, ready."""
    with FakeModel() as model:
        gateway = Gateway(shipped("openclaw"), tmp_path_factory.mktemp("claw"), agents_bin, model)
        try:
            gateway.start()
            yield gateway
        finally:
            gateway.cloister("stop", "--all")
            gateway.user.close()


def test_its_port_is_on_this_host_and_wants_its_token(up: Gateway) -> None:
    """It is listed, HTTP is answered, and its protocol by who has the token that it made; a stranger hears nothing."""
    listed = json.loads(up.cloister("vm", "list", "--json").stdout)
    token = up.token
    health = up.call("gateway", "call", "health", "--json", "--timeout", "300000", token=token)
    wrong = up.call("gateway", "call", "health", "--json", "--timeout", "300000", token="f" * 64)
    assert [(one["name"], one["image"], one["ports"]) for one in listed] == [("claw", up.image, [PORT])]
    assert (up.get("/healthz"), up.get("/")) == (200, 200)
    assert len(token) == 64
    assert json.loads(health.stdout)["ok"] is True, health.stdout + health.stderr
    assert wrong.returncode != 0
    assert "unauthorized" in (wrong.stdout + wrong.stderr).lower()


def test_its_agent_answers_by_a_model_whose_key_is_outside(up: Gateway) -> None:
    """From this host through the port to the gateway, from there through the run's proxy to the provider, and back."""
    answered = up.ask("what is the password of the day", up.token)
    assert "FAKE-OK" in answered.stdout, answered.stdout + answered.stderr + up.logs()
    asked = [request for request in up.model.requests if request.path.startswith("/v1/messages")]
    assert {request.headers.get("x-api-key") for request in asked} == {KEY}
    assert "password of the day" in json.dumps(asked[-1].body)
    hunt = f"grep -rls {KEY} ~ /etc /run /tmp /var /workspace; grep -ls {KEY} /proc/[0-9]*/environ; echo searched"
    assert up.inside(hunt).splitlines()[-1:] == ["searched"]
    assert not [line for line in up.inside(hunt).splitlines() if line.startswith("/")]


def test_it_ends_in_order_and_goes_on_where_it_was(up: Gateway) -> None:
    """Last: `stop` lets it end by itself and closes the port; started again it knows its token and what was said."""
    token = up.token
    stopped = up.cloister("stop", "--all", "--grace", "5m", timeout_s=400)
    receipt = up.user.receipts()[-1]
    assert stopped.returncode == 0, stopped.stderr
    assert receipt["reason"] == "exited", up.logs()
    assert receipt["exit_code"] in {0, 143}, "by itself, or by the TERM that it had waited on; never killed"
    assert up.get("/healthz") == 0
    assert not json.loads(up.cloister("vm", "list", "--json").stdout)

    before = len(up.model.requests)
    up.start()
    answered = up.ask("and now", token)
    assert up.token == token
    assert "FAKE-OK" in answered.stdout, answered.stdout + answered.stderr + up.logs()
    asked = [request for request in up.model.requests[before:] if request.path.startswith("/v1/messages")]
    assert "password of the day" in json.dumps(asked[-1].body)
    assert os.listdir(up.workspace)
