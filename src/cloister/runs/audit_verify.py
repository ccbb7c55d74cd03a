"""Verifying a log from its files and a public key alone, on whichever machine they are."""

from __future__ import annotations

from collections.abc import Mapping

from cloister.audit.verify import Report, Verifier
from cloister.errors import UsageError
from cloister.host import audit_key
from cloister.host.audit_files import KEYS, DamagedFileError, read_head, read_lines, segments


def verify(directory: str, key: str = "", noted: Mapping[int, str] | None = None) -> Report:
    """Return what is found in a directory of segments.

    Args:
        directory: where they are.
        key: path of a PEM file with public keys that are trusted; without it, those beside the log are.
        noted: hashes by number of line, of heads that were noted elsewhere.

    Raises:
        UsageError: there is no log, or no key.
        StepError: the key is none.
        OSError: something cannot be read.
    """
    try:
        found = segments(directory)
    except FileNotFoundError:
        found = []
    if not found:
        raise UsageError("no-audit-log", "there is no audit log here", where=directory)
    try:
        keys = audit_key.read_keys(key or f"{directory}/{KEYS}")
    except FileNotFoundError as error:
        remedy = "cloister audit verify --key FILE"
        raise UsageError("no-audit-key", "there is no public key", where=str(error.filename), remedy=remedy) from None
    head = read_head(directory)
    verifier = Verifier(keys, audit_key.check, {**(noted or {}), **({head.seq: head.hash} if head else {})})
    for segment in found:
        verifier.begin(segment.name, segment.first)
        try:
            for lines, torn in read_lines(segment):
                verifier.feed(lines)
                if torn:
                    verifier.torn(torn, last=segment == found[-1] and not segment.compressed)
        except DamagedFileError as error:
            verifier.unreadable(str(error))
    report = verifier.report(head_file=head is not None)
    report.pinned = bool(key)
    return report
