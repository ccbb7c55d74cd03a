"""A timeline as one HTML page: nothing is loaded, no script runs, and every text of an agent's is escaped.

It can be mailed, kept with a ticket, and opened years later. The page's own content security policy forbids whatever
could be loaded or run, and allows the one style sheet by its hash; so even an escape that was forgotten would show, not
act. Filters are check boxes and style rules. Rows stand in blocks that browsers lay out only when they are looked at
(`content-visibility`), which keeps a hundred thousand events usable. Light and dark follow the reader's system.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import html
import importlib.resources
import math
from collections import Counter
from collections.abc import Iterator
from functools import cache

from cloister.audit.describe import duration, size
from cloister.audit.rendering import visible
from cloister.audit.timeline import Entry, Node, Timeline, lanes

_BLOCK = 200
_BUCKETS = 180
_WIDTH, _LANE_HEIGHT, _LABEL = 1080, 26, 92
_DEEPEST = 64
"""Processes below this depth stand beside their parents: no browser likes lists nested a thousand times."""
_MOST_FOLDED = 5000
_NS = 1_000_000_000
_TITLES = {
    "life": "life", "process": "processes", "file": "files", "network": "network", "model": "models",
    "credential": "credentials", "alarm": "alarms",
}  # fmt: skip


def page(made: Timeline, source: str) -> Iterator[str]:
    """Yield the page in pieces; `source` says where the events are from."""
    yield _head(made)
    yield f"<header>{_title(made)}{_facts(made, source)}</header>"
    yield _cards(made)
    for name in lanes(made):
        yield f'<input type="checkbox" id="show-{name}" checked>'
    yield '<input type="checkbox" id="show-quiet" checked>'
    yield _filters(made)
    yield f'<figure class="overview">{_overview(made)}</figure>'
    if made.processes:
        yield from _processes(made)
    yield "<main><h2>What happened</h2>"
    for start in range(0, len(made.entries), _BLOCK):
        yield from _block(made, made.entries[start : start + _BLOCK])
    yield "</main>"
    yield f"<footer>{made.sums.events:,} events, from {text(source)}. Made by Cloister; times are UTC.</footer>"
    yield "</body></html>\n"


def text(raw: str) -> str:
    """Return a text as HTML shows it, whatever it holds: marks of HTML, control characters, changes of direction."""
    return html.escape(visible(raw), quote=True)


@cache
def _style() -> tuple[str, str]:
    """Return the style sheet and its hash, as a content security policy names it."""
    sheet = importlib.resources.files("cloister.audit").joinpath("timeline.css").read_text(encoding="utf-8")
    return sheet, base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()


def _head(made: Timeline) -> str:
    sheet, digest = _style()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f"<title>{text(made.agent or 'run')} · {text(made.run)}</title><style>{sheet}</style></head><body>"
    )


def _title(made: Timeline) -> str:
    good = made.exit_code == 0 and made.reason == "exited"
    ended = f"exit {made.exit_code}" if made.exit_code is not None else made.reason or "still running"
    if made.reason not in {"", "exited"} and made.exit_code is not None:
        ended += f", {made.reason}"
    badge = "good" if good else "open" if not made.reason else "bad"
    shown = f'<span class="badge {badge}">{text(ended)}</span>'
    return f"<h1>{text(made.agent or '?')} <code>{text(made.run)}</code> {shown}</h1>"


def _facts(made: Timeline, source: str) -> str:
    facts = (
        ("command", made.command), ("workspace", made.workspace),
        ("by", made.user + (f", as {made.account}" if made.account else "")),
        ("began", _absolute(made.first)), ("took", duration(made.last - made.first)),
        ("policy", made.policy[:16]), ("plan", made.plan[:16]), ("source", source),
    )  # fmt: skip
    rows = (f"<dt>{name}</dt><dd>{text(value)}</dd>" for name, value in facts if value)
    return f"<dl>{''.join(rows)}</dl>"


def _cards(made: Timeline) -> str:
    sums = made.sums
    cards = [
        ("process", f"{sums.programs:,}", "programs run", ""),
        ("file", f"{sums.lanes['file']:,}", "file events", ""),
        (
            "network",
            f"{sums.lanes['network']:,}",
            "connections",
            f"{size(sums.bytes_up)} up, {size(sums.bytes_down)} down",
        ),
        ("denied", f"{sums.denied:,}", "refused", ""),
        ("model", f"{sums.lanes['model']:,}", "model calls", f"{sums.tokens:,} tokens, ${sums.cost_usd:,.2f}"),
        ("credential", f"{sums.lanes['credential']:,}", "uses of credentials", ""),
        ("alarm", f"{sums.detections:,}", "detections", ""),
    ]
    shown = (
        f'<li class="{kind}{" none" if number == "0" else ""}">'
        f"<b>{number}</b><span>{what}</span><small>{more}</small></li>"
        for kind, number, what, more in cards
    )
    return f'<ul class="cards">{"".join(shown)}</ul>'


def _filters(made: Timeline) -> str:
    labels = (
        f'<label class="{name}" for="show-{name}">{_TITLES[name]} <em>{made.sums.lanes[name]:,}</em></label>'
        for name in lanes(made)
    )
    return f'<nav>{"".join(labels)}<label class="quiet" for="show-quiet">what went as usual</label></nav>'


def _overview(made: Timeline) -> str:
    """Return a picture: one row of bars per lane, taller where more happened, red where something was refused."""
    names = lanes(made)
    span = max(made.last - made.first, 1)
    counts: dict[str, Counter[int]] = {name: Counter() for name in names}
    bad: dict[str, set[int]] = {name: set() for name in names}
    for entry in made.entries:
        place = min(_BUCKETS - 1, (entry.time - made.first) * _BUCKETS // span)
        counts[entry.lane][place] += max(1, len(entry.folded))
        if entry.tone in {"denied", "alarm"}:
            bad[entry.lane].add(place)
    height = len(names) * _LANE_HEIGHT + 22
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="When what happened">']
    wide = (_WIDTH - _LABEL) / _BUCKETS
    for row, name in enumerate(names):
        floor = (row + 1) * _LANE_HEIGHT
        parts.append(f'<text x="0" y="{floor - 6}">{_TITLES[name]}</text>')
        parts.append(f'<path class="floor" d="M{_LABEL} {floor - 0.5}H{_WIDTH}"/>')
        top = math.log1p(max(counts[name].values(), default=1))
        for place, count in sorted(counts[name].items()):
            tall = max(2.0, (_LANE_HEIGHT - 6) * math.log1p(count) / top)
            kind = "refused" if place in bad[name] else name
            parts.append(
                f'<rect class="{kind}" x="{_LABEL + place * wide:.1f}" y="{floor - tall:.1f}" '
                f'width="{max(wide - 0.8, 1.5):.1f}" height="{tall:.1f}"/>'
            )
    for part in range(5):
        x = _LABEL + (_WIDTH - _LABEL) * part / 4
        anchor = ("start", "middle", "middle", "middle", "end")[part]
        shown = f"+{duration(span * part // 4) or '0'}"
        parts.append(f'<text class="tick" x="{x:.0f}" y="{height - 4}" text-anchor="{anchor}">{shown}</text>')
    return "".join([*parts, "</svg>"])


def _processes(made: Timeline) -> Iterator[str]:
    """Yield the tree of processes; without recursion, as an agent decides how deep it is."""
    yield '<details class="tree"><summary><h2>Processes</h2></summary><ul>'
    depth = 0
    stack = [(node, 0) for node in reversed(made.processes)]
    while stack:
        node, level = stack.pop()
        level = min(level, _DEEPEST)
        yield "<ul>" * (level - depth) + "</ul>" * (depth - level)
        depth = level
        yield _node(made, node)
        stack += [(child, level + 1) for child in reversed(node.children)]
    yield "</ul>" * (depth + 1) + "</details>"


def _node(made: Timeline, node: Node) -> str:
    took = duration(node.ended - node.started) if node.ended else ""
    facts = [f"+{_offset(made, node.started)}", took, f"{node.files:,} files" if node.files else ""]
    facts.append(f"{node.connections:,} connections" if node.connections else "")
    small = " · ".join(fact for fact in facts if fact)
    return f"<li><b>{text(node.name)}</b> <code>{text(node.command)}</code> <small>{small}</small></li>"


def _block(made: Timeline, entries: list[Entry]) -> Iterator[str]:
    yield f"<section><h3>{_absolute(entries[0].time)}</h3><ol>"
    for entry in entries:
        tone = entry.tone or "quiet"
        when, what = _offset(made, entry.time), text(entry.text)
        if entry.folded:
            lines = "\n".join(text(line) for line in entry.folded[:_MOST_FOLDED])
            more = len(entry.folded) - _MOST_FOLDED
            lines += f"\nand {more:,} more" if more > 0 else ""
            what = f"<details><summary>{what}</summary><pre>{lines}</pre></details>"
        yield f'<li class="{entry.lane} {tone}"><time>{when}</time><i>{text(entry.kind)}</i><div>{what}</div></li>'
    yield "</ol></section>"


def _offset(made: Timeline, moment: int) -> str:
    """Return when something was, from the beginning: `1.250`, `3:07.4`, `2:03:07`."""
    seconds = (moment - made.first) / _NS
    if seconds < 60:  # noqa: PLR2004
        return f"{seconds:.3f}"
    minutes, rest = divmod(seconds, 60)
    if minutes < 60:  # noqa: PLR2004
        return f"{int(minutes)}:{rest:04.1f}"
    return f"{int(minutes // 60)}:{int(minutes % 60):02}:{int(rest):02}"


def _absolute(moment: int) -> str:
    """Return a time in UTC; one that no calendar has, as a number."""
    try:
        return dt.datetime.fromtimestamp(moment // _NS, tz=dt.UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return str(moment)
