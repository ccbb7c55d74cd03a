"""`cloister doctor` on ledger and providers' keys: what is told, and that no key is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.cloister import BASE, User

pytestmark = pytest.mark.kernel
SECRET = "made-up-upstream-key-6"
PROVIDERS = {
    "good": "file:~/good.key",
    "gone": "file:~/gone.key",
    "open": "file:~/open.key",
    "ran": f"command:printf {SECRET}",
    "failed": "command:false",
    "variable": "env:SOME_KEY",
    "signed-in": "login:nobody",
    "free": "",
}


@pytest.fixture
def user(user: User) -> User:
    """A user with a provider of each kind."""
    tables = "".join(
        f'[providers.{name}]\nprotocol = "openai"\nbase_url = "http://127.0.0.1:1"\n'
        + (f'key = "{key}"\n' if key else "")
        for name, key in PROVIDERS.items()
    )
    user.write_policy(BASE + tables)
    for name, mode in (("good.key", 0o600), ("open.key", 0o644)):
        (user.home / name).write_text(SECRET)
        (user.home / name).chmod(mode)
    return user


def findings(user: User, workspace: Path, *words: str) -> dict[str, dict[str, str]]:
    """Return the findings about model calls by name; no secret is in anything."""
    done = user.run("doctor", "--json", *words, cwd=workspace, SOME_KEY=SECRET)
    assert SECRET not in done.stdout.replace(f"command:printf {SECRET}", "") + done.stderr
    found = json.loads(done.stdout)["findings"]
    return {one["name"]: one for one in found if one["needed_for"] == "model calls"}


def test_keys_are_read_and_never_shown(user: User, workspace: Path) -> None:
    """Each by its reference; what cannot be had comes with why and what to type."""
    found = findings(user, workspace)

    assert {name: one["state"] for name, one in found.items()} == {
        "ledger": "ok",
        "key good": "ok",
        "key gone": "missing",
        "key open": "missing",
        "key ran": "ok",
        "key failed": "missing",
        "key variable": "degraded",
        "key signed-in": "missing",
        "key free": "ok",
    }
    assert "chmod" in found["key open"]["remedy"]
    assert found["key signed-in"]["remedy"].startswith("cloister login")
    text = user.run("doctor", cwd=workspace).stdout
    assert "agents can run here" in text
    assert SECRET not in text.replace(f"command:printf {SECRET}", "")


def test_quick_starts_nothing(user: User, workspace: Path) -> None:
    """Commands are not run."""
    found = findings(user, workspace, "--quick")

    assert found["key ran"]["state"] == found["key failed"]["state"] == "degraded"
    assert found["key good"]["state"] == "ok"


def test_the_ledger_is_opened_and_told_with_its_size(user: User, workspace: Path) -> None:
    """A good one with schema and size, a broken one and a newer one as what they are."""
    import apsw

    from cloister.host.ledger_sqlite import SqliteLedger

    path = user.state / "ledger/ledger.db"
    assert "made with the first call" in findings(user, workspace)["ledger"]["meaning"]
    path.parent.mkdir(parents=True)
    SqliteLedger(str(path)).close()
    good = findings(user, workspace)["ledger"]
    assert (good["state"], good["meaning"]) == ("ok", f"{path}, schema 1, 0.0 MB")

    newer = apsw.Connection(str(path))
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    assert findings(user, workspace)["ledger"]["state"] == "missing"
    path.write_bytes(b"no database " * 1000)
    broken = findings(user, workspace)["ledger"]
    assert broken["state"] == "missing"
    assert "cannot be read" in broken["meaning"]


def test_without_providers_nothing_is_said(user: User, workspace: Path) -> None:
    """Whoever uses no models hears nothing of them, nor whoever has no policy yet."""
    user.write_policy(BASE)
    assert findings(user, workspace) == {}
    (user.home / ".config/cloister/cloister.toml").unlink()
    assert findings(user, workspace) == {}
