"""The inference proxy as a process of its own: virtual keys, metrics, reload, and an end that loses nothing."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fake_model import FakeModel

pytestmark = pytest.mark.kernel

KEY, WATCHER = "virtual-key-for-worker", "virtual-key-for-prometheus"
POLICY = """\
schema = 1
[providers.fake]
base_url = "{url}"
key = "file:~/model.key"
[agents.worker]
command = ["true"]
[agents.worker.llm]
providers = ["fake"]
tokens_per_day = 100_000
{more}
"""
BODY = {"model": "claude-sonnet-4-5", "max_tokens": 50, "messages": []}


class Service:
    """A running service."""

    def __init__(self, home: Path, model: FakeModel) -> None:
        self.home, self.model = home, model
        self.write(".config/cloister/cloister.toml", POLICY.format(url=model.url, more=""))
        self.write("model.key", "made-up-real-key")
        self.write("keys", f"# who may\nworker {KEY}\n@metrics {WATCHER}\n")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cloister.services.inference", "--keys", str(home / "keys"), "--listen",
             "127.0.0.1:0"],
            env={**os.environ, "HOME": str(home), "XDG_RUNTIME_DIR": str(home)}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def write(self, name: str, text: str) -> None:
        """Write a file of the owner's."""
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o600)

    def ask(self, path: str = "/v1/messages", body: object = BODY, key: str = KEY) -> tuple[int, str]:
        """Return status and body of an answer."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"authorization": f"Bearer {key}"})  # noqa: S310 - http, our own
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def end(self) -> int:
        """Stop it in order."""
        self.process.terminate()
        code = self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """A service before a fake model."""
    with FakeModel() as model:
        running = Service(tmp_path, model)
        yield running
        if running.process.poll() is None:
            running.end()


def test_callers_are_known_by_their_keys(service: Service) -> None:
    """A virtual key works, others do not, and the row of the call is in the ledger when the service has ended."""
    assert service.ask()[0] == 200
    assert service.ask(key="made-up-real-key")[0] == 401
    assert service.ask(key=WATCHER)[0] == 401
    assert service.end() == 0
    ledger = sqlite3.connect(service.home / ".local/state/cloister/ledger/ledger.db")
    assert ledger.execute("select agent, output_tokens, outcome from calls").fetchall() == [("worker", 5, "complete")]


def test_metrics_are_for_those_who_may_see_them(service: Service) -> None:
    """Their own key opens them; an agent's does not, and learns not even that they are there."""
    service.ask()
    status, text = service.ask("/metrics", None, WATCHER)
    assert status == 200
    assert 'cloister_llm_requests_total{agent="worker"' in text
    assert "cloister_llm_budget_used_ratio" in text
    assert service.ask("/metrics", None, KEY)[0] == 404
    assert service.ask("/metrics", None, "")[0] == 404


def test_a_reload_obeys_the_policy_as_it_is_now(service: Service) -> None:
    """SIGHUP reads it again; a broken one changes nothing."""
    service.ask()
    service.write(".config/cloister/cloister.toml", "broken [")
    service.process.send_signal(signal.SIGHUP)
    assert service.ask()[0] == 200
    service.write(".config/cloister/cloister.toml", POLICY.format(url=service.model.url, more='models = ["other"]'))
    service.process.send_signal(signal.SIGHUP)
    for _ in range(50):
        status, text = service.ask()
        if status == 403:
            break
    assert status == 403
    assert "not allowed" in text


def test_what_cannot_be_recorded_is_refused(tmp_path: Path) -> None:
    """A service has no runs to keep recordings with: it does not start, and a reload changes nothing."""
    with FakeModel() as model:
        running = Service(tmp_path, model)
        running.write(".config/cloister/cloister.toml", POLICY.format(url=model.url, more="record = true"))
        running.process.send_signal(signal.SIGHUP)
        assert running.ask()[0] == 200
        assert running.end() == 0
        done = subprocess.run(
            [*running.process.args, "--policy", str(tmp_path / ".config/cloister/cloister.toml")],
            env={**os.environ, "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}, capture_output=True, text=True,
            timeout=30, check=False,
        )  # fmt: skip
        assert done.returncode == 69
        assert "policy-not-enforceable" in done.stderr
        assert "llm.record" in done.stderr
