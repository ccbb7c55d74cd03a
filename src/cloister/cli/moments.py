"""Times as people type them: `7d`, `12h`, `2026-11-01`, `2026-11-01T14:30`, `today`. Days are those of UTC."""

from __future__ import annotations

import argparse
import datetime as dt
import time

from cloister.policy.units import parse_duration

DAY_S = 86400


def moment(text: str) -> float:
    """Return seconds since the epoch for a date, a length of time before now, or a word; for argparse's `type`."""
    now = time.time()
    today = now // DAY_S * DAY_S
    words = {"all": 0.0, "now": float("inf"), "today": today}
    if text in words:
        return words[text]
    if text == "month":
        return dt.datetime.fromtimestamp(today, tz=dt.UTC).replace(day=1).timestamp()
    try:
        found = dt.datetime.fromisoformat(text) if text[4:5] == "-" else None
    except ValueError:
        found = None
    if found is not None:
        return (found if found.tzinfo else found.replace(tzinfo=dt.UTC)).timestamp()
    try:
        return now - parse_duration(text)
    except ValueError:
        why = f"{text!r} is no time: write 7d, 12h, 2026-11-01, 2026-11-01T14:30, today, month or all"
        raise argparse.ArgumentTypeError(why) from None
