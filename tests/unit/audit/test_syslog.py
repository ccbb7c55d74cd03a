"""Syslog: headers and structured data by RFC 5424, lengths that receivers take."""

from __future__ import annotations

import json

import pytest

from cloister.audit import cef, ocsf, syslog
from cloister.audit.event import File
from cloister.audit.rendering import Origin
from support.audit_samples import ORIGIN, full, full_process, recorded, samples
from support.cef_parser import parse as parse_cef
from support.syslog_parser import SyslogError, frames, parse


def test_every_kind_is_a_message():
    """Every kind is a message of RFC 5424 with facility 13, time, host, kind and number, around the rendered event."""
    for record in samples():
        priority, header, data, text = parse(syslog.message(record, ORIGIN, cef.render))
        assert priority >> 3 == 13
        assert header == ("2026-09-21T14:13:20.123456Z", "box.example.org", "cloister", "-", record.kind)
        assert data == {"origin": {"software": "cloister", "swVersion": "1.2.3"}, "meta": {"sequenceId": "7"}}
        assert text == cef.render(record, ORIGIN)


@pytest.mark.parametrize(("severity", "level"), [(1, 6), (2, 5), (3, 4), (4, 3), (5, 2)])
def test_severities_are_levels(severity, level):
    """Severities become levels, from informational to critical."""
    record = recorded(full("file.opened", severity_id=severity))
    assert parse(syslog.message(record, ORIGIN, cef.render))[0] & 7 == level


def test_parameters_are_escaped():
    """Quotes, backslashes and brackets in structured data are escaped, and read back as they were."""
    odd = Origin(host="a b\n", version='1"]\\')
    _, header, data, _ = parse(syslog.message(recorded(full("file.opened")), odd, cef.render))
    assert header[1] == "a?b?"
    assert data["origin"]["swVersion"] == '1"]\\'
    with pytest.raises(SyslogError):
        parse(b'<110>1 - a b - c [origin v="a]b"] x')


@pytest.mark.parametrize("render", [cef.render, ocsf.render])
@pytest.mark.parametrize("octets", [syslog.MAX_OCTETS, syslog.MAX_UDP_OCTETS])
def test_no_message_is_longer_than_receivers_take(render, octets):
    """An event with huge names still fits, is still whole in its own format, and says that it was cut."""
    process = full_process(cmd_line=("\x01" * 90_000, *["y" * 500] * 2000), cwd="=" * 70_000, path="/p" * 20_000)
    details = {f"k{n}" * 40: "\\" * 5000 for n in range(500)}
    record = recorded(full("file.opened", process=process, file=File(path="\n" * 50_000), details=details))
    message = syslog.message(record, ORIGIN, render, octets=octets)
    assert len(message) <= octets
    text = parse(message)[3]
    if render is cef.render:
        assert parse_cef(text)[1]["externalId"] == "7"
    else:
        assert json.loads(text)["metadata"]["sequence"] == 7


def test_what_fits_is_not_touched():
    """A message that fits is the rendering itself."""
    record = recorded(full("file.opened", file=File(path="/x" * 300)))
    assert syslog.fitting(record, ORIGIN, ocsf.render, 8000) == ocsf.render(record, ORIGIN)


def test_frames_count_octets():
    """Frames are told apart by the octets that they count, whatever is in them."""
    messages = [b"a\nb", "é".encode(), b"12 x"]
    assert frames(b"".join(map(syslog.octet_counted, messages))) == (messages, b"")


def test_sequence_ids_begin_again():
    """RFC 5424 has 31 bits for a sequence number: after the last comes 1."""
    record = recorded(full("file.opened"), seq=2**31)
    assert parse(syslog.message(record, ORIGIN, cef.render))[2]["meta"]["sequenceId"] == "1"


def test_a_time_beyond_years_is_left_out():
    """A time that no calendar has is said to be unknown."""
    assert syslog.timestamp(2**80) == "-"
