"""How Cloister's own inference proxy is started for the benchmark: as its documents say, with every check on.

The policy limits everything it can and refuses nothing: models, requests, concurrency, tokens and dollars, each
looked at with every request. Journal and ledger are on, as for every user.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import apsw

POLICY = """\
schema = 1

[providers.up]
protocol = "anthropic"
base_url = "http://127.0.0.1:{upstream}"
key = "file:{key}"

[agents.bench]
command = ["true"]

[agents.bench.llm]
providers = ["up"]
models = ["claude-*"]
max_tokens = 4096
concurrency = 10_000
requests_per_minute = 1_000_000_000
tokens_per_minute = 1_000_000_000_000
tokens_per_day = 1_000_000_000_000
cost_per_day_usd = 100_000_000.0
cost_per_month_usd = 1_000_000_000.0
"""


class Setup(NamedTuple):
    """A command, and how a request passes it."""

    argv: Sequence[str]
    environment: dict[str, str]
    token: str
    rows: Callable[[], int]


def prepare(folder: Path, upstream_port: int, key: str) -> Setup:
    """Write the policy, the provider's key, and a virtual key for the one who asks."""
    home, runtime = folder / "cloister", folder / "runtime"
    conf = home / ".config/cloister"
    conf.mkdir(parents=True)
    runtime.mkdir(mode=0o700)
    token = f"bench-{secrets.token_hex(16)}"
    texts = {
        conf / "cloister.toml": POLICY.format(upstream=upstream_port, key=home / "up.key"),
        home / "up.key": key,
        home / "keys": f"bench {token}\n",
    }
    for path, text in texts.items():
        path.touch(mode=0o600)
        path.write_text(text)
    argv = [
        sys.executable,
        "-m",
        "cloister.services.inference",
        "--keys",
        str(home / "keys"),
        "--listen",
        "127.0.0.1:0",
    ]
    environment = {"HOME": str(home), "XDG_RUNTIME_DIR": str(runtime)}
    return Setup(argv, environment, token, lambda: rows(home / ".local/state/cloister/ledger"))


def rows(folder: Path) -> int:
    """Return how many calls the ledger holds that were sent."""
    database = apsw.Connection(str(folder / "ledger.db"), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        return int(database.execute("select count(*) from calls where outcome <> 'refused' and attempts > 0").get)
    finally:
        database.close()
