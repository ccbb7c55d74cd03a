"""Logins in a store: made without a browser, and read back."""

from __future__ import annotations

import json
import time
from pathlib import Path

from cloister.credentials import logins as kept_logins
from cloister.credentials.oauth_answers import read_token_answer
from cloister.host.logins import Shelf
from cloister.runs.login_files import load
from support.fake_oauth import FakeOauth


def make(directory: Path, provider: FakeOauth, *, age_s: float = 0.0, name: str = "test") -> kept_logins.Kept:
    """Store a login that was made some time ago."""
    now = time.time() - age_s
    granted = read_token_answer(200, json.dumps(provider.grant()).encode(), now)
    kept = kept_logins.new(name, "test", provider.login(), granted, now)
    with Shelf(str(directory)).held(name) as held:
        held.write(kept_logins.encode(kept))
    return kept


def stored(directory: Path, name: str = "test") -> kept_logins.Kept:
    """Return what is stored."""
    return load(Shelf(str(directory)), name)
