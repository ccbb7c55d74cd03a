"""OTLP: requests that the published protobuf schema takes."""

from __future__ import annotations

import json

from google.protobuf import json_format
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

from cloister.audit import otlp
from support.audit_samples import ORIGIN, full, recorded, samples


def _parsed(*records):
    return json_format.Parse(otlp.request(records, ORIGIN), ExportLogsServiceRequest())


def _attributes(values):
    return {item.key: item.value for item in values}


def test_every_kind_is_taken_by_the_schema():
    """All kinds in one request are parsed by OpenTelemetry's own schema, without an unknown field, each key once."""
    records = list(samples())
    found = _parsed(*records)
    logs = found.resource_logs[0].scope_logs[0].log_records
    assert len(logs) == len(records)
    for record, log in zip(records, logs, strict=True):
        assert log.time_unix_nano == record.time
        assert log.event_name == f"cloister.{record.kind}"
        assert len({item.key for item in log.attributes}) == len(log.attributes)


def test_what_happened_has_the_names_of_the_conventions():
    """Host, process, address and decision are found by OpenTelemetry's names, and numbers are numbers."""
    found = _parsed(recorded(full("egress.decided"), seq=2**53 + 1))
    assert _attributes(found.resource_logs[0].resource.attributes)["host.name"].string_value == "box.example.org"
    log = found.resource_logs[0].scope_logs[0].log_records[0]
    values = _attributes(log.attributes)
    assert values["cloister.seq"].int_value == 2**53 + 1
    assert values["process.pid"].int_value == 4321
    assert [v.string_value for v in values["process.command_args"].array_value.values] == [
        "node",
        "it's me.js",
        "--x=1|2",
    ]
    assert values["server.address"].string_value == "api.example.org"
    assert values["cloister.disposition"].string_value == "blocked"
    assert log.severity_number == 9


def test_integers_are_decimal_strings_and_nothing_is_null():
    """64-bit integers stand as strings, as the JSON encoding demands; no member is null."""
    text = otlp.request([recorded(full("kernel.invoked"))], ORIGIN)
    assert b"null" not in text
    log = json.loads(text)["resourceLogs"][0]["scopeLogs"][0]["logRecords"][0]
    assert log["timeUnixNano"] == "1790000000123456789"
    kinds = {key for item in log["attributes"] for key in item["value"]}
    assert kinds == {"stringValue", "intValue", "doubleValue", "boolValue", "arrayValue"}
