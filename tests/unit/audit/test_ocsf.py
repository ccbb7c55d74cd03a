"""OCSF: what is exported is what the published schema says."""

from __future__ import annotations

import json

import pytest

from cloister.audit import ocsf
from cloister.audit.event import Http
from cloister.audit.kinds import kinds
from support import ocsf_schema
from support.audit_samples import ORIGIN, full, recorded, samples


def test_every_kind_is_valid_by_the_published_schema():
    """An event of every kind, with everything and with nothing in it, has what its class requires and nothing else."""
    for record in samples():
        found = ocsf_schema.mistakes(json.loads(ocsf.render(record, ORIGIN)))
        assert not found, (record.kind, found)


def test_every_kind_has_a_class_and_an_activity_of_the_schema():
    """The numbers in kinds.toml are a class of OCSF 1.7.0 and an activity that this class knows."""
    for name, kind in kinds().items():
        event = ocsf_schema.classes()[kind.class_uid]
        enum = ocsf_schema.merged("events", event)[0]["activity_id"]["enum"]
        assert str(kind.activity_id) in {"0": {}, "99": {}, **enum}, name


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda e: e.pop("file"), "required"),
        (lambda e: e.update(path="/x"), "unknown"),
        (lambda e: e.update(severity_id=7), "enum"),
        (lambda e: e.update(time="now"), "is no timestamp_t"),
        (lambda e: e.update(type_uid=1), "type_uid"),
        (lambda e: e["metadata"].update(version="9"), "metadata.version"),
        (lambda e: e["device"].pop("hostname"), "at_least_one"),
        (lambda e: e["metadata"].update(profiles=[]), "unknown"),
    ],
)
def test_the_check_finds_what_is_wrong(change, complaint):
    """The check of these tests can fail: an attribute too few, too many, of another type, of a profile not named."""
    event = json.loads(ocsf.render(recorded(full("file.opened")), ORIGIN))
    change(event)
    assert complaint in " ".join(ocsf_schema.mistakes(event))


def test_what_happened_stands_where_ocsf_has_it():
    """Who, where, what and how it was decided are found under the names of the schema."""
    event = ocsf.event(recorded(full("egress.decided"), seq=9), ORIGIN)
    assert event["type_uid"] == 400101
    assert event["metadata"]["uid"] == "0f1e2d3c:9"
    assert event["metadata"]["sequence"] == 9
    assert event["metadata"]["correlation_uid"] == event["actor"]["session"]["uid"] == "20260101-abcdef"
    assert event["actor"]["app_name"] == "claude"
    assert event["dst_endpoint"] == {"hostname": "api.example.org", "ip": "2001:db8::1", "port": 443}
    assert (event["action_id"], event["disposition_id"], event["status_id"]) == (2, 2, 2)
    assert event["unmapped"]["chain_hash"] == "c" * 64


def test_the_method_of_a_request_is_the_activity():
    """HTTP requests have the activity of their method, and *Other* for a method that the schema does not know."""
    assert ocsf.event(recorded(full("egress.request")), ORIGIN)["activity_id"] == 3

    odd = ocsf.event(recorded(full("egress.request", http=Http(method="PROPFIND", path="/x"))), ORIGIN)
    assert (odd["activity_id"], odd["activity_name"]) == (99, "HTTP request")


def test_numbers_that_columns_cannot_hold_are_kept_elsewhere():
    """A sequence number beyond 32 bits stands in the uid and in `unmapped`, not in an integer_t."""
    event = json.loads(ocsf.render(recorded(full("file.opened"), seq=2**40), ORIGIN))
    assert not ocsf_schema.mistakes(event)
    assert event["metadata"]["uid"].endswith(str(2**40))
    assert event["unmapped"]["sequence"] == 2**40


def test_a_kind_of_a_newer_version_is_still_an_event():
    """A kind that this version does not know is OCSF's base event, valid as well."""
    assert not ocsf_schema.mistakes(json.loads(ocsf.render(recorded(full("new.thing")), ORIGIN)))
