"""A real agent in an image of its own: it works, and the key of its provider is outside."""

from pathlib import Path

import pytest

from support.bound import keep
from support.cloister import User
from support.fake_model import FakeModel

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
_KEY = "made-up-upstream-key-4"
_POLICY = """\
schema = 1

[providers.fake]
protocol = "openai"
base_url = "{url}"
key = "{key}"

[agents.pi]
preset = "pi"
isolation = "microvm"
environment_audit = false
egress = {{ preset_hosts = false, allow = [] }}

[agents.pi.llm]
providers = ["fake"]
models = ["fake-1"]
"""


def test_pi_runs_in_its_own_image(home: Path, workspace: Path, fake_model: FakeModel) -> None:
    """The preset names the image, the model answers, and only the broker had the key."""
    user = User(home)
    user.write_policy(_POLICY.format(url=fake_model.url, key=keep(user, _KEY, "model.key")))
    built = user.run("image", "build", "pi", cwd=workspace, timeout_s=900)
    done = user.run("run", "--no-pty", "pi", "-p", "hi", cwd=workspace, timeout_s=280)
    user.close()

    assert built.returncode == 0, built.stderr
    assert (done.returncode, done.stdout) == (0, "FAKE-OK\n"), done.stderr
    assert [request.headers["authorization"] for request in fake_model.requests] == [f"Bearer {_KEY}"]
    assert user.receipts()[-1]["host"]["image"] == "pi 1"
