"""The words completion asks for while somebody types: `cloister __complete agents|runs|living|profiles`.

Fast, and silent whatever is wrong: no model, no broker. Only names that policy and store would
accept are printed, because shells expand what they are given (`compgen -W` runs `$(...)`).
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from cloister.runs import client

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_FINISHED = b'"status":"finished"'


def main(argv: list[str]) -> int:
    """Print names, one per line."""
    kind = argv[0] if argv else ""
    try:
        found = _tables("agents" if kind == "agents" else "profiles") if kind in {"agents", "profiles"} else _runs(kind)
    except (OSError, ValueError, AttributeError):
        return 0
    sys.stdout.write("".join(f"{name}\n" for name in found if _NAME.fullmatch(name)))
    return 0


def _tables(key: str) -> list[str]:
    import tomllib

    config = os.environ.get("XDG_CONFIG_HOME", "")
    own = (config if config.startswith("/") else f"{client.home()}/.config") + "/cloister/cloister.toml"
    names: set[str] = set()
    for path in (own, "/etc/cloister/cloister.toml"):
        try:
            names.update(tomllib.loads(Path(path).read_text("utf-8")).get(key, {}))
        except (OSError, ValueError):
            continue
    return sorted(names)


def _runs(kind: str) -> list[str]:
    """Return ids, newest first; `living` leaves finished ones out by the look of their records."""
    state = os.environ.get("XDG_STATE_HOME", "")
    folder = Path(state if state.startswith("/") else f"{client.home()}/.local/state", "cloister/runs")
    ids = sorted((entry.name for entry in folder.iterdir()), reverse=True)[:200]
    if kind == "living":
        ids = [run for run in ids if _FINISHED not in (folder / run / "run.json").read_bytes()]
    return [*ids, "last"] if ids else []
