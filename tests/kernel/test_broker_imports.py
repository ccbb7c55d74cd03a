"""What a run without credentials, tokens and models costs the broker: nothing of theirs is loaded."""

from pathlib import Path

import pytest

from support.bound import credential, keep, policy
from support.cloister import User
from support.imports import WatchedBroker

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]

HEAVY = {"cryptography", "h2", "hpack", "apsw", "jwt", "prometheus_client", "sqlite3", "http.client", "botocore"}
"""Not `ssl`: asyncio and uvloop import that themselves."""
OURS = {"inspected", "terminate", "tls", "h2_server", "credentials", "identity_store", "model_calls", "signing_ssh"}


def test_a_plain_run_loads_nothing_heavy(user: User, workspace: Path) -> None:
    """Idle, and after a run with egress, the broker has none of it; a run with a credential brings its part."""
    with WatchedBroker(user) as broker:
        idle = broker.loaded()
        assert user.inside("curl -sS http://cloister.internal/; true", cwd=workspace).returncode == 0
        plain = broker.loaded()
        user.write_policy(policy(443, credential(keep(user), 443)))
        assert user.inside("true", cwd=workspace).returncode == 0
        with_credential = broker.loaded()

    for loaded in (idle, plain):
        assert not HEAVY & loaded
        assert not {f"cloister.{room}.{name}" for room in ("relay", "runs") for name in OURS} & loaded
    assert {"cloister.relay.server", "cloister.runs.supervise"} <= plain
    assert {"cryptography", "cloister.runs.credentials"} <= with_credential
