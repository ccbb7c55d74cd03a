"""`cloister audit export`: events in the words of others, to standard output or to a receiver."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

from cloister.audit import kept
from cloister.audit.formats import FORMATS, LINES, line
from cloister.audit.rendering import Origin, single_line
from cloister.cli import audit_options
from cloister.cli.arguments import Parser
from cloister.errors import RetryError, UsageError
from cloister.host.audit_files import DamagedFileError
from cloister.host.audit_follow import Following
from cloister.host.audit_syslog import SETTLE_S, Trust
from cloister.policy.values import check_otlp, check_syslog
from cloister.runs.audit_export import before, here, log_id
from cloister.runs.audit_targets import Item, OtlpTarget, SyslogTarget, Target

POLL_S = 0.5
_PORTION = 500


def describe(actions: argparse._SubParsersAction[Parser]) -> None:
    """Add the action."""
    parser = audit_options.action(actions, "export", "print or send events as OCSF, CEF, syslog, OpenTelemetry or JSON")
    parser.add_argument(
        "--format", choices=LINES, default="json", help="of each line (json: the lines of the log itself)"
    )
    audit_options.add_conditions(parser)
    audit_options.add_log(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="go on until interrupted")
    parser.add_argument(
        "--to", metavar="URL", default="",
        help="send them once: udp://, tcp:// or tls://HOST:PORT, `unix`, or http(s):// of a collector; what is sent "
        "and goes on for good is configured in [audit] of the policy",
    )  # fmt: skip
    parser.add_argument("--ca", metavar="FILE", default="", help="authorities that the receiver is trusted by")
    parser.add_argument(
        "--certificate", metavar="FILE", default="", help="our certificate and key, where it asks for one"
    )


def main(options: argparse.Namespace) -> int:
    """Print or send.

    Raises:
        CloisterError: there is no log, it cannot be read, or the receiver does not take events.
    """
    target = _target(options)
    directory = audit_options.directory_of(options)
    try:
        origin = here(log_id(directory))
        if target is None:
            for item in _items(options, directory):
                text = line(options.format, item.record, item.raw, origin)
                # The log's own line is kept to the byte, but for people, whose terminal could obey it.
                sys.stdout.buffer.write((single_line(text) if sys.stdout.isatty() else text) + b"\n")
                if options.follow:
                    sys.stdout.buffer.flush()
            sys.stdout.buffer.flush()
            return 0
    except (DamagedFileError, ValueError) as error:
        raise RetryError("audit-damaged", str(error), where=directory, remedy="cloister audit verify") from error
    sent = _send(target, options, directory, origin)
    print(f"{sent:,} events were sent to {options.to}")
    return 0


def _target(options: argparse.Namespace) -> Target | None:
    """Return the receiver, where one is named."""
    if not options.to:
        return None
    trust = Trust(options.ca, options.certificate)
    try:
        if options.to.startswith(("http://", "https://")):
            check_otlp(options.to)
            return OtlpTarget(options.to, trust)
        check_syslog(options.to)
    except ValueError as error:
        raise UsageError("receiver-invalid", str(error), where="--to") from None
    form = "cef" if options.format == "syslog" else options.format
    if form not in FORMATS:
        raise UsageError("format-invalid", "this format is not sent by syslog", where="--format", remedy="--format cef")
    return SyslogTarget(options.to, form, trust)


def _items(options: argparse.Namespace, directory: str) -> Iterator[Item]:
    """Yield what is meant, in the order of the log; with --follow for good."""
    question = audit_options.question_of(options)
    test = question.test()
    following = Following(directory, before(directory, question.since) if question.since else 0)
    while True:
        lines = following.more()
        for one in lines:
            record = kept.read(one.raw)
            if record is not None and test(record):
                yield Item(one.raw, record)
        if not lines:
            if not options.follow:
                return
            time.sleep(POLL_S)


def _send(target: Target, options: argparse.Namespace, directory: str, origin: Origin) -> int:
    """Send what is meant, wait until it has arrived as far as the receiver tells, and return how many there were."""
    sent, last = 0, 0
    try:
        portion: list[Item] = []
        for item in _items(options, directory):
            portion.append(item)
            if options.follow or len(portion) >= _PORTION:
                target.put(portion, origin)
                sent, last = sent + len(portion), portion[-1].record.seq
                portion.clear()
                target.look()
        if portion:
            target.put(portion, origin)
            sent, last = sent + len(portion), portion[-1].record.seq
        deadline = time.monotonic() + SETTLE_S + 10
        while target.arrived < last and time.monotonic() < deadline:
            time.sleep(0.1)
            target.look()
    except (OSError, DamagedFileError, ValueError) as error:
        raise RetryError("export-failed", f"the receiver did not take all events: {error}", where=options.to) from error
    finally:
        target.close()
    for word in target.complaints:
        print(f"cloister: {word}", file=sys.stderr)
    if target.arrived < last:
        raise RetryError("export-failed", "the receiver did not take all events in time", where=options.to)
    return sent
