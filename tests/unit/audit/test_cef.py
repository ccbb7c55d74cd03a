"""CEF: lines that a strict reader of the standard takes, with what happened in the keys that it has for that."""

from __future__ import annotations

import pytest

from cloister.audit import cef
from cloister.audit.event import Endpoint, File
from support.audit_samples import ORIGIN, full, full_process, recorded, samples
from support.cef_parser import CefError, parse


@pytest.mark.parametrize("version", [0, 1])
def test_every_kind_is_a_line_of_cef(version):
    """An event of every kind is taken by a strict parser, with vendor, kind, name and its place in the log."""
    for record in samples():
        header, pairs = parse(cef.render(record, ORIGIN, version))
        assert header[:5] == [str(version), "Cloister", "Cloister", "1.2.3", record.kind]
        assert pairs["externalId"] == "7"
        assert pairs["deviceExternalId"] == "0f1e2d3c"


def test_what_happened_stands_under_its_keys():
    """Who, what, where and how it was decided have the keys of the dictionary; own slots say what they are."""
    header, pairs = parse(cef.render(recorded(full("egress.decided")), ORIGIN))
    assert header[6] == "2"
    wanted = {
        "rt": "1790000000123", "suser": "alice", "spid": "4321", "sproc": "/usr/bin/node", "dhost": "api.example.org",
        "c6a3": "2001:db8::1", "dpt": "443", "app": "tls", "act": "blocked", "outcome": "failure",
        "reason": "host-not-allowed", "cs1": "20260101-abcdef", "cs1Label": "run", "cs2": "claude", "cs2Label": "agent",
        "cs3": "egress.allow[0]", "cs4": "node 'it'\"'\"'s me.js' '--x=1|2'", "out": "10", "in": "20",
        "requestMethod": "GET",
    }  # fmt: skip
    assert {key: pairs.get(key) for key in wanted} == wanted


@pytest.mark.parametrize(
    "name",
    ["a\nb", "a\r\nCEF:0|x", "a=b c=d", "a|b", "\\", "\\n", "a\\=b", "x cs1=evil", " spaces  inside ", "naïve-😀"],
)
def test_hostile_names_come_back_as_they_were(name):
    """A path with line breaks, `|`, `=`, backslashes or something like a key is read back as that path, in one line."""
    record = recorded(full("file.opened", file=File(path=f"/w/{name}/end")))
    line = cef.render(record, ORIGIN)
    assert len(line.decode().splitlines()) == 1
    assert parse(line)[1]["filePath"] == f"/w/{name}/end"


@pytest.mark.parametrize(
    ("name", "shown"), [("\x1b[2J", "\\x1b[2J"), ("a\0b", "a\\x00b"), ("\u202egnp.exe", "\\u202egnp.exe")]
)
def test_what_would_act_on_a_terminal_is_shown_as_its_escape(name, shown):
    """Escape sequences, NUL and marks that turn text round are visible, and do nothing."""
    record = recorded(full("file.opened", file=File(path=name)))
    assert parse(cef.render(record, ORIGIN))[1]["filePath"] == shown


def test_a_value_that_its_key_cannot_hold_is_cut():
    """A path longer than 1023 signs and a command line longer than 4000 are cut, and end with an ellipsis."""
    process = full_process(cmd_line=("x" * 9000,), path="/" + "p" * 3000)
    pairs = parse(cef.render(recorded(full("process.executed", process=process)), ORIGIN))[1]
    assert len(pairs["cs4"]) == 4000
    assert len(pairs["sproc"]) == 1023
    assert pairs["cs4"].endswith("…")


def test_the_two_versions_differ_as_the_standard_says():
    """Version 1 has the keys that came with 1.2; version 0 has not."""
    record = recorded(full("model.called"))
    old, new = parse(cef.render(record, ORIGIN, 0))[1], parse(cef.render(record, ORIGIN, 1))[1]
    assert set(new) - set(old) == {"reportedDuration", "reportedResourceName", "reportedResourceType"}
    assert new["reportedDuration"] == "5"


def test_an_ipv4_address_is_a_destination():
    """IPv4 addresses stand in `dst`; what is no address stands there under no circumstances."""
    record = recorded(full("network.connected", endpoint=Endpoint(ip="192.0.2.1", port=80, protocol="tcp")))
    pairs = parse(cef.render(record, ORIGIN))[1]
    assert (pairs["dst"], pairs["proto"]) == ("192.0.2.1", "tcp")
    odd = recorded(full("network.connected", endpoint=Endpoint(ip="1.2.3.4 act=allowed")))
    assert "dst" not in parse(cef.render(odd, ORIGIN))[1]


def test_details_get_keys_of_our_own():
    """Flat details stand under keys of the form that the standard asks of vendors."""
    record = recorded(full("kernel.invoked", details={"exit_code": 3, "odd key=": "v", "=": "lost"}))
    pairs = parse(cef.render(record, ORIGIN))[1]
    assert (pairs["CloisterCloisterExitcode"], pairs["CloisterCloisterOddKey"]) == ("3", "v")


@pytest.mark.parametrize(
    "line", [b"CEF:0|a|b|c|d|e|1|k=a=b", b"CEF:0|a|b|c|d|e|1|k=a\nb", b"CEF:0|a|b|c|d|e|1|k=1 k=2", b"CEF:0|a"]
)
def test_the_parser_of_these_tests_is_strict(line):
    """The parser refuses signs that are not escaped, keys that are there twice, and fields that are missing."""
    with pytest.raises(CefError):
        parse(line)
