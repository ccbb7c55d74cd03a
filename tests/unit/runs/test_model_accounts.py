"""Budgets of model calls: one account per agent and user, whoever's broker keeps them."""

from __future__ import annotations

from typing import Any, cast

from cloister.llm.ledger import Spent
from cloister.policy.model import Llm, Policy
from cloister.runs.model_calls import ModelCalls


class _Books:
    """Books that remember whose spending was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def spent(self, agent: str, _since: float, _until: float, run: str = "", user: str = "") -> Spent:
        """Return nothing spent."""
        del run
        self.asked.append((agent, user))
        return cast("Spent", None)


def test_users_of_one_agent_have_an_account_each() -> None:
    """In the system's broker alice's calls do not count against bob's budget; two runs of alice's share one."""
    calls = ModelCalls(cast("Any", _Books), cast("Any", lambda: None), cast("Any", lambda: None))
    llm, policy = Llm(tokens_per_day=1000), Policy(schema=1)
    alice = calls.caller("r1", "pi", "alice", llm, policy, token="a")
    again = calls.caller("r2", "pi", "alice", llm, policy, token="b")
    bob = calls.caller("r3", "pi", "bob", llm, policy, token="c")
    assert alice.account is again.account
    assert alice.account is not bob.account
    assert calls.account("pi", "bob") is bob.account
