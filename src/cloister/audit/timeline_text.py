"""A timeline as lines for a terminal. Texts come out as they are: who prints them escapes them."""

from __future__ import annotations

from collections.abc import Iterator

from cloister.audit.describe import duration, size
from cloister.audit.timeline import Node, Timeline

_NS = 1_000_000_000


def facts(made: Timeline) -> list[tuple[str, str]]:
    """Return what is said before the timeline, by name."""
    sums = made.sums
    code = f"exit {made.exit_code}" if made.exit_code is not None else ""
    end = ", ".join(word for word in (code, made.reason) if word) or "still running, or its end is not on record"
    traffic = f"{sums.lanes['network']:,} connections, {size(sums.bytes_up)} up, {size(sums.bytes_down)} down"
    models = f"{sums.lanes['model']:,} calls, {sums.tokens:,} tokens, ${sums.cost_usd:,.4f}"
    return [
        ("run", made.run), ("agent", made.agent), ("by", made.user), ("as", made.account), ("command", made.command),
        ("workspace", made.workspace), ("ended", end), ("took", duration(made.last - made.first)),
        ("processes", f"{sums.programs:,} programs run" if sums.programs else ""),
        ("files", f"{sums.lanes['file']:,} events" if sums.lanes["file"] else ""),
        ("network", traffic if sums.lanes["network"] else ""), ("refused", f"{sums.denied:,}" if sums.denied else ""),
        ("models", models if sums.lanes["model"] else ""),
        ("detections", f"{sums.detections:,}" if sums.detections else ""),
    ]  # fmt: skip


def offset(made: Timeline, moment: int) -> str:
    """Return when something was, from the beginning of the run, in seconds."""
    return f"+{(moment - made.first) / _NS:,.3f}"


def tree(made: Timeline) -> Iterator[str]:
    """Yield one line per process, indented below the one that made it."""
    stack = [(node, 0) for node in reversed(made.processes)]
    while stack:
        node, depth = stack.pop()
        yield f"{'  ' * min(depth, 32)}{node.name}  {_words(node)}".rstrip()
        stack += [(child, depth + 1) for child in reversed(node.children)]


def _words(node: Node) -> str:
    took = duration(node.ended - node.started) if node.ended else ""
    counts = [
        f"{node.files:,} files" if node.files else "",
        f"{node.connections:,} connections" if node.connections else "",
    ]
    return "  ".join(part for part in (node.command, took, *counts) if part)
