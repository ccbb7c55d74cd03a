"""From recorded events to the lines that would allow them."""

from cloister.egress.events import EgressEvent
from cloister.egress.proposal import propose, wanted, why


def event(host, port, verdict, reason, rule=""):
    """Make an event with what matters here."""
    return EgressEvent(time=1.0, protocol="connect", host=host, port=port, verdict=verdict, reason=reason, rule=rule)


EVENTS = [
    event("b.example.org", 443, "allow", "allowed-by-mode", "mode = learn"),
    event("b.example.org", 443, "allow", "connection-reset", "mode = learn"),
    event("a.example.org", 8443, "deny", "not-in-allowlist"),
    event("a.example.org", 8443, "deny", "not-in-allowlist"),
    event("ruled.example.org", 443, "allow", "allowed-by-rule", "ruled.example.org ([agents.x.egress] allow[0])"),
    event("cloister.internal", 80, "allow", "proxy-status"),
    event("evil host", 0, "deny", "host-invalid"),
    event("bad.example.org", 443, "deny", "denied-by-rule", "bad.example.org"),
    event("10.0.0.1", 80, "deny", "address-refused", "10.0.0.0/8"),
]


def test_wanted_entries_are_exact_and_few():
    """Only places that no rule allowed are proposed; refused addresses, bad spellings and ruled hosts are not."""
    assert wanted(EVENTS) == ('"a.example.org:8443"', '"b.example.org"')


def test_local_names_are_explained_and_never_proposed():
    """A name of the local network gets its line in `why`; `learn` does not offer it, however often an agent asks."""
    events = [event("nas", 80, "deny", "local-name"), event("printer.local", 631, "deny", "local-name")]
    assert wanted(events) == ()
    assert [reason.line for reason in why(events)] == ['"nas:80"', '"printer.local:631"']


def test_a_proposal_is_a_diff():
    """The diff adds the missing lines and keeps the present ones; nothing missing gives nothing."""
    diff = propose(EVENTS, ["ruled.example.org"], agent="claude")
    assert "[agents.claude.egress]" in diff
    added = [line for line in diff.splitlines() if line.startswith("+    ")]
    assert added == ['+    "a.example.org:8443",', '+    "b.example.org",']
    assert not [line for line in diff.splitlines() if line.startswith("-    ")]
    assert propose(EVENTS, ["a.example.org:8443", "b.example.org"], agent="claude") == ""


def test_why_counts_refusals_and_names_a_line_only_where_one_helps():
    """Each refused place comes once, with how often; a deny rule is not answered by another allow line."""
    reasons = why(EVENTS)
    assert [(reason.host, reason.times, reason.line) for reason in reasons] == [
        ("a.example.org", 2, '"a.example.org:8443"'),
        ("evil host", 1, ""),
        ("bad.example.org", 1, ""),
        ("10.0.0.1", 1, ""),
    ]


def test_why_shows_the_first_request():
    """Where a request could be seen, the refusal names its method and path, of the first one."""
    events = [
        EgressEvent(0.0, "https", "a.com", 443, "deny", "method-not-allowed", method=method, path="/x")
        for method in ("POST", "PUT")
    ]
    events.append(EgressEvent(0.0, "connect", "b.com", 443, "deny", "not-in-allowlist"))
    assert [reason.request for reason in why(events)] == ["POST /x", ""]
