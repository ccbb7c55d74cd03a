"""What the actions of `cloister audit` share: conditions, which log, printing of events. No action of its own."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches

import msgspec

from cloister.audit.describe import describe
from cloister.audit.event import Event
from cloister.audit.kept import severity
from cloister.audit.kinds import kinds
from cloister.audit.question import FOREVER_NS, Question, is_pattern, resolve
from cloister.cli import output, records
from cloister.cli.arguments import Parser
from cloister.cli.moments import moment
from cloister.errors import DeniedError, RetryError, UsageError
from cloister.host.audit_files import segments
from cloister.host.audit_index import Progress
from cloister.runs.audit_log import SYSTEM_LOG, AuditLog

SEVERITIES = ("informational", "low", "medium", "high", "critical")
_SHADES = {1: "", 2: "", 3: "yellow", 4: "red", 5: "red"}
_NS = 1_000_000_000
_RUN_LETTERS = 12
_SECONDS_BEFORE_PROGRESS = 0.5
_UNPRINTABLE = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def add_conditions(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which events are meant."""
    for name, value, text in (
        ("run", "RUN", "events of this run: its id, the beginning of one, or `last`"),
        ("agent", "AGENT", "of this agent"),
        ("user", "USER", "of runs of this person"),
        ("kind", "KIND", "of this kind, as process.executed, process, or 1007"),
        ("path", "PATTERN", "with this path of a file, program or socket"),
        ("host", "PATTERN", "with this name or address of a host"),
        ("rule", "NAME", "decided by this rule, or matched by this detection"),
    ):
        parser.add_argument(f"--{name}", metavar=value, action="append", default=[], help=text)
    parser.add_argument(
        "--decision", action="append", choices=("allowed", "blocked", "asked"), default=[], help="so decided"
    )
    parser.add_argument("--severity", choices=SEVERITIES, default=SEVERITIES[0], help="at least so severe")
    parser.add_argument("--since", metavar="WHEN", type=moment, default=0.0, help="from then on")
    parser.add_argument("--until", metavar="WHEN", type=moment, default=float("inf"), help="up to then")


def add_log(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which log is asked."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--system", action="store_true", help="ask the system's log")
    which.add_argument("--own", action="store_true", help="ask the user's own log")
    which.add_argument("--log", metavar="DIR", default="", help="ask the log in this directory")


def question_of(options: argparse.Namespace) -> Question:
    """Return what the options ask.

    Raises:
        UsageError: there is no such kind or run.
    """
    try:
        wanted = resolve(tuple(options.kind))
    except KeyError as error:
        word = str(error.args[0])
        close = get_close_matches(word, [*kinds(), *{name.partition(".")[0] for name in kinds()}], n=1)
        remedy = f"did you mean {close[0]}?" if close else "cloister audit stats --by kind"
        raise UsageError("kind-unknown", f"no event is of the kind {word!r}", remedy=remedy) from None
    return Question(
        runs=tuple(_run(word) for word in options.run), agents=tuple(options.agent), users=tuple(options.user),
        kinds=wanted, severity=SEVERITIES.index(options.severity) + 1, decisions=tuple(options.decision),
        paths=tuple(options.path), hosts=tuple(options.host), rules=tuple(options.rule),
        since=int(options.since * _NS),
        until=FOREVER_NS if options.until == float("inf") else int(options.until * _NS),
    )  # fmt: skip


def directory_of(options: argparse.Namespace) -> str:
    """Return the directory of the log that is asked.

    Raises:
        UsageError: there is none.
        DeniedError: this user may not read it.
    """
    own = f"{records.places().state}/audit"
    if options.log or options.own:
        return _readable(options.log or own)
    if options.system or (os.access(SYSTEM_LOG, os.R_OK | os.X_OK) and segments(SYSTEM_LOG)):
        return _readable(SYSTEM_LOG)
    return _readable(own)


@contextmanager
def opened_log(options: argparse.Namespace, *, indexed: bool = True) -> Iterator[AuditLog]:
    """Open the log that is asked, its index up to date; say afterwards what could not be read.

    Raises:
        UsageError, DeniedError: as `directory_of`.
        RetryError: the index cannot be written, or the log went away meanwhile.
    """
    directory = directory_of(options)
    log = AuditLog(directory, index_of(directory, records.places().state))
    try:
        if indexed:
            progress = _Shown()
            log.refresh(progress)
            progress.end()
        yield log
    except OSError as error:
        message = f"{error.filename or directory}: {error.strerror or error}"
        raise RetryError("audit-unreadable", message, where=directory) from error
    finally:
        log.close()
    if log.unreadable:
        print(f"cloister: {log.unreadable:,} lines are no events (cloister audit verify)", file=sys.stderr)
    if log.changed:
        print("cloister: a segment was changed under its index; ask again (cloister audit verify)", file=sys.stderr)


def index_of(directory: str, state: str) -> str:
    """Return where the index of a log is kept, below a user's state directory."""
    return f"{state}/audit-index/{hashlib.sha256(os.path.realpath(directory).encode()).hexdigest()[:16]}.db"


def print_event(event: Event, *, as_json: bool, flush: bool = False) -> None:
    """Print one event: as recorded for programs, as a line for people."""
    print(encoded(event) if as_json else line(event), flush=flush)


def encoded(event: Event) -> str:
    """Return an event as JSON on one line; what a terminal could obey stands as an escape."""
    text = msgspec.json.encode(event).decode()
    return text if text.isprintable() else _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def line(event: Event) -> str:
    """Return an event as people read it."""
    second, rest = divmod(event.time, _NS)
    held = severity(event)
    who = f"{event.agent or '-'}/{event.run[:_RUN_LETTERS] or '-'}"
    what = output.clean(describe(event))
    if event.disposition == "blocked":
        what = output.colour(what, "red")
    elif _SHADES[held]:
        what = output.colour(what, _SHADES[held])
    when = output.colour(f"{output.moment(second)}.{rest // 1_000_000:03d}", "dim")
    return f"{when}  {output.clean(who):<21}  {output.clean(event.kind):<19}  {what}"


def action(actions: argparse._SubParsersAction[Parser], name: str, text: str) -> argparse.ArgumentParser:
    """Add the parser of an action."""
    return actions.add_parser(name, help=text)


class _Shown:
    """Progress of indexing, on a terminal, when it takes longer than a moment."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._shown = False

    def __call__(self, progress: Progress) -> None:
        if sys.stderr.isatty() and time.monotonic() - self._began > _SECONDS_BEFORE_PROGRESS:
            self._shown = True
            sys.stderr.write(f"\rindexing the log: {progress.part:4.0%}, {progress.events:,} events")
            sys.stderr.flush()

    def end(self) -> None:
        """Wipe the line out."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")


def _run(word: str) -> str:
    if word == "last":
        return records.store().find(word)
    return word if len(word) >= _RUN_LETTERS or is_pattern(word) else f"{word}*"


def _readable(directory: str) -> str:
    try:
        found = segments(directory)
    except FileNotFoundError:
        found = []
    except PermissionError:
        raise DeniedError(
            "audit-denied", "this user may not read that log", where=directory,
            remedy="sudo cloister audit …, or --own for what your own broker recorded",
        ) from None  # fmt: skip
    except OSError as error:
        raise UsageError("audit-missing", f"no log can be read: {error.strerror}", where=directory) from None
    if not found:
        remedy = "cloister run …: a log begins with the first event (docs/audit.md)"
        raise UsageError("audit-missing", "there is no log of the audit", where=directory, remedy=remedy)
    return directory
