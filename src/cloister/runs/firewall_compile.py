"""From the system's policy to the packet filter of its accounts: who may pass where, then the text of the table.

Pure. Every account that was ever made is in it, also one that nobody is granted any more: its
packets are refused. An agent's profiles are not: the table knows a uid, not a run. A run that would
need wider rules than its account has (`direct_rules`) is refused (`runs/unit_internet.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cloister.egress.addresses import Network, parse_network
from cloister.egress.hosts import Address
from cloister.egress.nft import lifted_embedding
from cloister.egress.nft_statements import check_statement
from cloister.egress.nft_units import AccountRules, ruleset
from cloister.egress.rules import Rule, compile_guard, compile_ruleset
from cloister.errors import PolicyError, Problem
from cloister.plan.unit import Account
from cloister.policy.model import Agent


class DirectRules(NamedTuple):
    """What of an agent's policy the packet filter enforces: the same here, the same rules in the table."""

    internet: bool
    private: tuple[str, ...]
    deny: tuple[tuple[Network, Rule], ...]
    block: tuple[str, ...]
    statements: tuple[str, ...]


def direct_rules(agent: Agent, name: str = "") -> DirectRules:
    """Return what the packet filter must know of this agent.

    Raises:
        PolicyError: `egress-invalid`, for rules that cannot be read.
    """
    internet = agent.egress.mode == "internet"
    return DirectRules(
        internet=internet,
        private=agent.egress.private if internet else (),
        deny=compile_ruleset(agent.egress, agent=name).deny.networks() if internet else (),
        block=agent.unit.block,
        statements=agent.unit.firewall,
    )


def compile_firewall(
    accounts: Iterable[Account],
    agents: Mapping[str, Agent],
    attached: tuple[Network, ...] = (),
    resolvers: tuple[Address, ...] = (),
) -> str:
    """Return the text of the table, for `host.firewall.install`.

    Args:
        accounts: all that are recorded, those of services among them.
        agents: agents of the system's policy by name, presets folded in.
        attached: networks the host has an address in: its neighbours are refused also where these are public.
        resolvers: whom the host asks for names. Accounts in mode `internet` may ask them too, wherever they are.

    Raises:
        PolicyError: `firewall-invalid` with every mistake in `unit.block` and `unit.firewall`, `egress-invalid`.
    """
    listed = tuple(accounts)
    used = {account.agent for account in listed} & set(agents)
    problems = [problem for name in sorted(used) for problem in _problems(name, agents[name])]
    if problems:
        raise PolicyError(problems, reference="firewall-invalid")
    return ruleset((_account(account, agents.get(account.agent), attached) for account in listed), resolvers)


def _account(account: Account, agent: Agent | None, attached: tuple[Network, ...]) -> AccountRules:
    if agent is None or agent.isolation != "unit":
        return AccountRules(account.name, account.uid)
    direct = direct_rules(agent, account.agent)
    guard = compile_guard(agent.egress, attached=attached, agent=account.agent) if direct.internet else None
    block = tuple(parse_network(text) for text in direct.block)
    return AccountRules(account.name, account.uid, guard, direct.deny, block, direct.statements)


def _problems(name: str, agent: Agent) -> Iterable[Problem]:
    table = f".agents.{name}"
    for number, text in enumerate(agent.unit.block):
        try:
            parse_network(text)
        except ValueError as error:
            yield Problem(f"{text!r} is no network: {error}", f"{table}.unit.block[{number}]", '"203.0.113.0/24"')
    for number, text in enumerate(agent.unit.firewall):
        try:
            check_statement(text)
        except ValueError as error:
            yield Problem(str(error), f"{table}.unit.firewall[{number}]", '"tcp dport 25 counter reject"')
    if agent.egress.mode == "internet":
        for network in lifted_embedding(compile_guard(agent.egress, agent=name)):
            message = f"{network} embeds IPv4 addresses: no packet filter can judge what is inside"
            yield Problem(message, f"{table}.egress.private", 'leave it out, or mode = "deny"')
