"""What `check` says of credentials, each beside the policy that is fine; and how a plan shows them."""

from __future__ import annotations

from typing import Any

import pytest

from cloister.egress.rules import compile_guard, compile_ruleset
from cloister.errors import PolicyError
from cloister.policy.model import Agent, Credential, Egress, EgressRule, Filesystem, Injection, Workspace
from cloister.runs.credentials_plan import credentials_for, planned, spoken
from cloister.runs.credentials_warnings import warnings

HOME = "/home/me"


def one(reference: str = "pass:x", *, host: str = "api.example.org", env: str = "", **inject: Any) -> Credential:
    """Return a credential."""
    keys: dict[str, Any] = {"scheme": "bearer", **inject}
    return Credential(secret=reference, env=env, inject=Injection(host=host, **keys))


def agent(*, allow: tuple[str | EgressRule, ...] = ("api.example.org",), **keys: Any) -> Agent:
    """Return an agent."""
    return Agent(egress=Egress(allow=allow), **keys)


def said(subject: Agent) -> list[str]:
    """Return the warnings."""
    rules = compile_ruleset(subject.egress, agent="a"), compile_guard(subject.egress, agent="a")
    return [warned.message for warned in warnings(subject, "a", HOME, rules)]


def test_a_good_policy_is_silent() -> None:
    """The twin of all others."""
    assert said(agent(credentials={"x": one()})) == []


CASES = {
    "unreachable": (agent(credentials={"x": one(host="other.example.org")}), "may not reach"),
    "port": (agent(credentials={"x": one(port=8443)}), "may not reach"),
    "denied": (
        Agent(egress=Egress(mode="learn", deny=("api.example.org",)), credentials={"x": one()}),
        "may not reach",
    ),
    "carried": (agent(credentials={"x": one("env:T")}, pass_environment=("T",)), "pass_environment"),
    "read": (agent(credentials={"x": one("file:~/s/k")}, filesystem=Filesystem(read=("~/s",))), "will not start"),
    "roots": (agent(credentials={"x": one("file:/srv/p/k")}, workspace=Workspace(roots=("/srv",))), "will not start"),
    "nowhere": (agent(credentials={"x": Credential(secret="pass:x")}), "goes nowhere"),
    "two": (agent(credentials={"x": one(), "y": one(scheme="git")}), "same part of requests"),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_each_mistake_has_its_warning(name: str) -> None:
    """One warning, which says what is wrong."""
    subject, words = CASES[name]
    (message,) = said(subject)

    assert words in message


@pytest.mark.parametrize(
    "subject",
    [
        agent(credentials={"x": one("env:T")}, pass_environment=("U",)),
        agent(credentials={"x": one("file:~/sibling")}, filesystem=Filesystem(read=("~/s",))),
        agent(credentials={"x": one(), "y": one(scheme="query", query="k")}),
        agent(credentials={"x": one(), "y": one(env="Y")}),
        agent(allow=(EgressRule(host="api.example.org", methods=("GET",)),), credentials={"x": one()}),
        Agent(egress=Egress(mode="ask"), credentials={"x": one()}),
    ],
)
def test_what_is_near_a_mistake_is_none(subject: Agent) -> None:
    """Other variables, files beside, other places of a request, rules with methods, and hosts that are asked about."""
    assert said(subject) == []


def test_a_plan_shows_references_only() -> None:
    """Names, references, places, form, variables and limits."""
    inject = Injection(
        host=("a.example.org", "b.example.org"), port=8443, scheme="header", header="X-Key", paths=("/v1/**",)
    )
    (shown,) = planned(Agent(credentials={"x": Credential(secret="pass:x", env="X", inject=inject, mask=True)}))

    assert shown.describe() == (
        "x: pass:x; to a.example.org:8443, b.example.org:8443; as header X-Key; placeholder in X; "
        "for /v1/** only; masked in answers"
    )
    assert spoken((shown,)) == ("X for a.example.org:8443, b.example.org:8443",)
    assert planned(Agent(credentials={"keys": Credential(keys=("SHA256:x",))})) == ()


def test_one_variable_twice_is_refused_also_after_merging() -> None:
    """A preset or a profile may bring the second one, which a check of the file alone does not see."""
    with pytest.raises(PolicyError) as caught:
        planned(Agent(environment={"X": "1"}, credentials={"x": one(env="X")}))

    assert ".credentials.x.env" in caught.value.problems[0].where


def test_which_credentials_belong_to_a_place() -> None:
    """Host and port count."""
    subject = Agent(credentials={"x": one(), "y": one(port=8443), "k": Credential(keys=("SHA256:x",))})

    assert credentials_for(subject, "api.example.org", 443) == ("x",)
    assert credentials_for(subject, "api.example.org", 8443) == ("y",)
    assert credentials_for(subject, "x.api.example.org", 443) == ()
