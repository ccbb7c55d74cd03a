"""The process that sends the audit's log to a SIEM: `python -I -m cloister.services.audit_export`.

It reads the log, connects to receivers, and writes cursor files; it keeps nothing, and no secret but, where a receiver
asks for one, its own certificate. For the system's log it runs as a user of its own with the log's group, beside the
keeper, which needs no network so. One thread per receiver, so that one that hangs holds up no other.

With `--lifeline` it belongs to the process at the other end of its standard input: when that ends, it sends what is
left for a while, and ends too. What is then not sent, the next one sends.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from cloister.audit.formats import FORMATS
from cloister.errors import CloisterError, RetryError, UsageError, render
from cloister.host.audit_syslog import Trust
from cloister.policy.first_use import look_at_types
from cloister.policy.values import check_alarm, check_otlp, check_syslog
from cloister.runs.audit_alarms import target_of
from cloister.runs.audit_export import Export, here
from cloister.runs.audit_targets import OtlpTarget, SyslogTarget, Target

LINGER_S = 15.0
"""How long it goes on sending after its lifeline ended."""
_LOCK = "lock"


def main(words: list[str] | None = None) -> int:
    """Send until told to end.

    Returns 0 after SIGTERM or the end of the lifeline, else the exit code of what went wrong.
    """
    try:
        options = _options(sys.argv[1:] if words is None else words)
        os.makedirs(options.cursors, mode=0o700, exist_ok=True)
        with _locked(options.cursors):
            _serve(options)
    except CloisterError as error:
        _say(render(error))
        return error.exit_code
    except (OSError, ValueError) as error:
        _say(f"cloister: the audit cannot be exported: {error}")
        return RetryError.exit_code
    return 0


def _options(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cloister-audit-export", allow_abbrev=False)
    parser.add_argument("--log", required=True)
    parser.add_argument("--cursors", required=True)
    parser.add_argument("--syslog", default="")
    parser.add_argument("--format", choices=FORMATS, default="cef")
    parser.add_argument("--otlp", default="")
    parser.add_argument("--alarm", default="")
    parser.add_argument("--ca", default="")
    parser.add_argument("--certificate", default="")
    parser.add_argument("--lifeline", action="store_true")
    options = parser.parse_args(words)
    try:
        if options.syslog:
            check_syslog(options.syslog)
        if options.otlp:
            check_otlp(options.otlp)
        if options.alarm:
            check_alarm(options.alarm)
    except ValueError as error:
        raise UsageError("receiver-invalid", str(error)) from None
    return options


def exports(options: argparse.Namespace) -> list[Export]:
    """Return an export for each receiver.

    Raises:
        OSError: a cursor cannot be read.
    """
    trust = Trust(options.ca, options.certificate)
    targets: list[tuple[str, Target]] = []
    if options.syslog:
        targets.append((options.syslog, SyslogTarget(options.syslog, options.format, trust)))
    if options.otlp:
        targets.append((options.otlp, OtlpTarget(options.otlp, trust)))
    if options.alarm:
        targets.append((f"alarm {options.alarm}", target_of(options.alarm, options.format, trust)))
    return [Export(options.log, options.cursors, name, target, here()) for name, target in targets]


def _serve(options: argparse.Namespace) -> None:
    ending, at_once = threading.Event(), threading.Event()

    def end(_signal: int, _frame: FrameType | None) -> None:
        at_once.set()
        ending.set()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    look_at_types()
    threads = [
        threading.Thread(target=_send, args=(export, ending, at_once), name=export.name) for export in exports(options)
    ]
    for thread in threads:
        thread.start()
    while not ending.is_set():
        if options.lifeline and select.select([0], [], [], 1.0)[0] and not os.read(0, 4096):
            ending.set()
        elif not options.lifeline:
            ending.wait(1.0)
    for thread in threads:
        thread.join()


def _send(export: Export, ending: threading.Event, at_once: threading.Event) -> None:
    """Send to one receiver. When it is to end: at once, or when nothing is left, or after a while."""
    deadline = float("inf")
    while not at_once.is_set():
        now = time.monotonic()
        wait = export.turn(now)
        for word in export.news:
            _say(f"<4>cloister: {word}")
        export.news.clear()
        if ending.is_set():
            deadline = min(deadline, now + LINGER_S)
            if wait and (now >= deadline or export.idle):
                break
            at_once.wait(min(wait, max(0.0, deadline - now)))
        else:
            ending.wait(wait)
    export.close()


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


@contextlib.contextmanager
def _locked(cursors: str) -> Iterator[None]:
    """Let one process at a time send: two would send everything twice."""
    descriptor = os.open(f"{cursors}/{_LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RetryError("audit-export-runs", "another process exports this log", where=cursors) from None
        yield
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
