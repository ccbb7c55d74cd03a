"""Renderings of events against any text: it comes back as it was, or is escaped, and is never a second record."""

from __future__ import annotations

import json

from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

from cloister.audit import cef, ocsf, otlp, syslog
from cloister.audit.event import Endpoint, Event, File, Http, Model, Process
from cloister.audit.formats import LINES, line
from cloister.audit.kinds import kinds
from cloister.audit.ocsf_objects import is_address
from cloister.audit.rendering import Origin, visible
from support import cef_parser, ocsf_schema, syslog_parser
from support.audit_samples import ORIGIN, recorded

_BITS = st.sampled_from(
    ["\n", "\r", "|", "=", "\\", " ", '"', "]", "[", "\0", "\x1b[31m", "\x7f", "\x85", "\u2028", "\u2029", "\u202e",
     "CEF:0|", "\\n", " cs1=x", "\ufeff", "é", "😀", "{", "}", "<110>1 ", "12 ", "\t"]
)  # fmt: skip
_BYTES = st.binary(max_size=40).map(lambda data: data.decode("utf-8", "backslashreplace"))
_ANY = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), _BYTES)
TEXT = st.one_of(_ANY, st.lists(st.one_of(_BITS, _ANY), max_size=8).map("".join))
_INT = st.integers(0, 2**63 - 1)
_SMALL = st.integers(0, 2**31 - 1)

_PROCESSES = st.builds(
    Process, pid=_SMALL, uid=TEXT, namespace_pid=_SMALL, name=TEXT, path=TEXT,
    cmd_line=st.lists(TEXT, max_size=4).map(tuple), cwd=TEXT, user_id=st.none() | _SMALL, parent_uid=TEXT,
    parent_pid=_SMALL, hash=TEXT, truncated=st.booleans(),
)  # fmt: skip
_MODELS = st.builds(Model, provider=TEXT, name=TEXT, tokens=_SMALL, cost_usd=st.floats(0, 1e9), request_id=TEXT)
EVENTS = st.builds(
    Event, time=_INT, kind=st.sampled_from(sorted(kinds())), run=TEXT, agent=TEXT, user=TEXT, account=TEXT, policy=TEXT,
    plan=TEXT, severity_id=st.integers(1, 5), disposition=st.sampled_from(["", "allowed", "blocked", "asked"]),
    rule=TEXT, reason=TEXT, error=_SMALL, message=TEXT, process=st.none() | _PROCESSES, target=st.none() | _PROCESSES,
    file=st.none() | st.builds(File, path=TEXT, target=TEXT, flags=_SMALL),
    endpoint=st.none() | st.builds(Endpoint, hostname=TEXT, ip=TEXT, port=_SMALL, path=TEXT, protocol=TEXT),
    http=st.none() | st.builds(Http, method=TEXT, path=TEXT, status=st.integers(0, 999)), model=st.none() | _MODELS,
    credential=TEXT, bytes_up=_INT, bytes_down=_INT, duration_ns=_INT, source=TEXT, count=st.integers(1, 2**40),
    details=st.dictionaries(TEXT, st.one_of(TEXT, st.integers(-(2**63), 2**63 - 1), st.booleans()), max_size=4),
)  # fmt: skip
_SEQUENCES = st.integers(1, 2**62)


@settings(max_examples=150, deadline=None)
@given(event=EVENTS, seq=_SEQUENCES)
def test_no_rendering_is_ever_two_lines(event, seq):
    """Every format is one line, by every way of counting lines but for `json`, which is the log's own line."""
    record = recorded(event, seq)
    raw = json.dumps({"seq": seq, "hash": record.hash}).encode()
    for name in LINES:
        text = line(name, record, raw, ORIGIN)
        assert len(text.decode().splitlines()) == 1, name
        assert not any(ord(sign) < 32 or 127 <= ord(sign) < 160 for sign in text.decode()), name


@settings(max_examples=150, deadline=None)
@given(event=EVENTS, seq=_SEQUENCES)
def test_cef_is_read_back(event, seq):
    """A strict parser finds the kind and the number, and the texts as they were but for what was made visible."""
    record = recorded(event, seq)
    for version in (0, 1):
        header, pairs = cef_parser.parse(cef.render(record, ORIGIN, version))
        assert (header[4], pairs["externalId"]) == (event.kind, str(seq))
        for key, value in (("msg", event.message), ("suser", event.user), ("cs1", event.run), ("cs2", event.agent)):
            assert _reads_as(pairs.get(key, ""), value), key


def _reads_as(shown, value):
    """Whether a value of CEF stands for a text: line breaks as they are, the rest visible, spaces at its ends too."""
    kept = "".join(part if part in ("\r", "\n") else visible(part) for part in value)
    return shown.replace("\\x20", " ") == kept.replace("\\x20", " ")


@settings(max_examples=150, deadline=None)
@given(event=EVENTS, seq=_SEQUENCES)
def test_ocsf_is_valid_and_keeps_texts(event, seq):
    """An event of any content is valid by the published schema, and its texts are read back exactly."""
    found = json.loads(ocsf.render(recorded(event, seq), ORIGIN))
    assert not ocsf_schema.mistakes(found)
    assert found["message"] == (event.message or kinds()[event.kind].name)
    assert found["actor"].get("app_name", "") == event.agent
    if event.endpoint is not None and event.endpoint.ip and not is_address(event.endpoint.ip):
        assert "ip" not in found.get("dst_endpoint", {})


@settings(max_examples=100, deadline=None)
@given(event=EVENTS, seq=_SEQUENCES)
def test_otlp_is_taken_by_the_schema(event, seq):
    """OpenTelemetry's own protobuf schema takes a request of any content, and finds the texts as they were."""
    parsed = json_format.Parse(otlp.request([recorded(event, seq)], ORIGIN), ExportLogsServiceRequest())
    log = parsed.resource_logs[0].scope_logs[0].log_records[0]
    values = {item.key: item.value for item in log.attributes}
    assert values["cloister.seq"].int_value == seq
    assert values["user.name"].string_value == event.user if event.user else "user.name" not in values


@settings(max_examples=150, deadline=None)
@given(event=EVENTS, seq=_SEQUENCES, host=TEXT, version=TEXT, octets=st.sampled_from([1024, 2048, 8000]))
def test_syslog_is_read_back(event, seq, host, version, octets):
    """A strict parser of RFC 5424 finds one message that is short enough, and in it one CEF record."""
    origin = Origin(host=host, log="ab", version=version)
    message = syslog.message(recorded(event, seq), origin, cef.render, octets=octets + 600)
    assert len(message) <= octets + 600
    _, _, data, text = syslog_parser.parse(message)
    assert data["origin"]["swVersion"] == visible(version[:32])
    assert cef_parser.parse(text)[1]["externalId"] == str(seq)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXT, min_size=3, max_size=3), size=st.integers(1, 400_000), octets=st.sampled_from([2048, 8000]))
def test_huge_names_fit(texts, size, octets):
    """Names of any length, of any signs, are shortened until the message fits, and stay one record of their format."""
    huge = [(text or "x") * (1 + size // max(1, len(text))) for text in texts]
    event = Event(time=1, kind="file.opened", file=File(path=huge[0]), message=huge[1], details={huge[2]: huge[0]})
    for render in (cef.render, ocsf.render):
        message = syslog.message(recorded(event), ORIGIN, render, octets=octets)
        assert len(message) <= octets
        text = syslog_parser.parse(message)[3]
        assert cef_parser.parse(text) if render is cef.render else json.loads(text)
