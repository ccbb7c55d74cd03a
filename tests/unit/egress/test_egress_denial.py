"""Answers to refused clients, and the status page."""

import json

from cloister.egress.decision import Target, Verdict
from cloister.egress.denial import denial_response, socks_reply_code
from cloister.egress.hosts import parse_host
from cloister.egress.rules import compile_ruleset
from cloister.egress.status import status_body
from cloister.policy.model import Egress


def test_a_refusal_says_what_a_model_needs():
    """Status 403, the reason as a field, and a JSON body with host, reason, rule and remedy."""
    verdict = Verdict("deny", "not-in-allowlist", "", "no rule names this host", "add it")
    head, body = denial_response(verdict, Target("http", parse_host("a.test"), 80), close=True).split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 403 Forbidden\r\n")
    assert b"\r\nx-cloister-reason: not-in-allowlist" in head
    assert b"content-length: %d\r\n" % len(body) in head
    shown = json.loads(body)
    assert (shown["host"], shown["port"], shown["reason"], shown["remedy"]) == (
        "a.test",
        80,
        "not-in-allowlist",
        "add it",
    )


def test_faults_are_no_refusals():
    """A name that does not resolve is a 502 and says so; SOCKS has its own codes."""
    assert denial_response(Verdict("deny", "dns-failed"), None).startswith(b"HTTP/1.1 502 ")
    assert denial_response(Verdict("deny", "dns-failed"), None, head_only=True).endswith(b"\r\n\r\n")
    assert socks_reply_code("not-in-allowlist") == 2
    assert socks_reply_code("connect-failed") == 5


def test_the_status_page_tells_the_limits():
    """The agent learns mode and rules before it tries."""
    shown = json.loads(status_body("run-1", compile_ruleset(Egress(allow=("b.test", "a.test:22")), agent="pi")))
    assert (shown["run"], shown["agent"], shown["mode"]) == ("run-1", "pi", "deny")
    assert shown["allow"] == ["a.test:22", "b.test"]
