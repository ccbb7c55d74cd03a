"""Where events are sent, as the policy says it: keys that are checked, and the unit that is made of them."""

from __future__ import annotations

import pytest

from cloister.errors import PolicyError
from cloister.isolation.export_units import SERVICE, export_units, export_wanted
from cloister.isolation.unit_files import DaemonFacts
from cloister.policy.document import read
from cloister.policy.load import load_document
from cloister.policy.model import Audit

FACTS = DaemonFacts(python="/opt/cloister/bin/python", root_links={}, root_directories=frozenset())


def _load(text):
    return load_document(read(f"schema = 1\n[audit]\n{text}\n".encode(), "x.toml"), preset_names=()).audit


@pytest.mark.parametrize(
    "text",
    [
        'syslog = "unix"', 'syslog = "udp://[2001:db8::1]:514"',
        'syslog = "tls://siem.example.org:6514"\nformat = "ocsf"',
        'otlp = "https://collector.example.org:4318"', 'otlp = "http://[::1]:4318/otlp/v1/logs"',
        'ca = "/etc/ssl/siem.pem"\ncertificate = "~/siem.pem"',
    ],
)  # fmt: skip
def test_receivers_are_taken(text):
    """Addresses of syslog receivers and collectors, and files for TLS, are policy."""
    assert _load(text) != Audit()


@pytest.mark.parametrize(
    "text",
    [
        'syslog = "siem:514"', 'syslog = "udp://a b:1"', 'syslog = "tls://a:1/x"', 'syslog = "tls://:::514"',
        'format = "xml"', 'otlp = "grpc://a:1"', 'otlp = "https://user:secret@a"', 'otlp = "https://a/?key=secret"',
        'otlp = "https://a\\n"', 'ca = "siem.pem"',
    ],
)  # fmt: skip
def test_what_is_no_receiver_is_a_mistake(text):
    """Other schemes, credentials in addresses, line breaks and relative paths are refused with their place."""
    with pytest.raises(PolicyError) as error:
        _load(text)
    assert ".audit." in str(error.value.problems[0].where) or "audit" in str(error.value)


def test_without_a_receiver_there_is_no_unit():
    """No receiver, no unit; with one there is one that wants to be started and restarted when its text changes."""
    assert export_units(FACTS, Audit()) == {}
    assert export_wanted(Audit()) == ()
    wanted = export_wanted(Audit(otlp="https://a"))
    assert [(one.unit, one.restart_for) for one in wanted] == [("cloister-audit-export.service", (SERVICE,))]


def test_the_unit_sends_what_the_policy_names_and_can_do_little_else():
    """Receivers are its words, files reach it as credentials; it has a user of its own and no capability."""
    audit = Audit(
        syslog="tls://siem:6514", otlp="https://c:4318", format="json", ca="/etc/a b.pem", certificate="/k.pem"
    )
    lines = export_units(FACTS, audit)[SERVICE].splitlines()
    (start,) = [line for line in lines if line.startswith("ExecStart=")]
    assert "--syslog tls://siem:6514 --otlp https://c:4318 --ca %d/ca --certificate %d/certificate" in start
    assert "--format json" in start
    assert {'LoadCredential="ca:/etc/a b.pem"', "LoadCredential=certificate:/k.pem"} <= set(lines)
    assert {"User=cloister-export", "SupplementaryGroups=cloister-audit", "CapabilityBoundingSet="} <= set(lines)
    assert {"NoNewPrivileges=yes", "ProtectSystem=strict", "ProtectHome=yes"} <= set(lines)
    assert not any(line.startswith(("ReadWritePaths=", "LogsDirectory=")) for line in lines)
