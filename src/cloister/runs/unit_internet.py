"""Mode `internet` of a run under systemd, decided: what `runs/internet.py` says, for an account of ours.

The filter of accounts on the host knows a uid, not a run. So a run may be narrower than its account (that stands in the
filter of its own network namespace), and a run that would be wider, or needs statements of its own, is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Network, collapse_addresses, ip_network

import msgspec

from cloister.egress.addresses import Guard, Network, parse_network
from cloister.egress.nft import blocked
from cloister.egress.rules import Ruleset
from cloister.errors import UnsupportedError
from cloister.isolation.unit_network import Addresses
from cloister.plan.facts import HostFacts
from cloister.policy.model import Agent
from cloister.runs.firewall_compile import direct_rules
from cloister.runs.internet import GATEWAY_IPV6, Internet, internet

_NEIGHBOURS = ("ff02::1:ff00:0/104", f"{GATEWAY_IPV6}/128")
"""Whom the kernel asks inside where pasta's gateway is (RFC 4861): it does so in the name of the unit that made the
namespace, so systemd's addresses hold for that too. On the host both packet filters refuse them."""


class UnitInternet(msgspec.Struct, frozen=True, kw_only=True):
    """What a run under systemd in this mode needs beyond the others."""

    internet: Internet
    outside: Addresses
    """What systemd lets pasta's unit reach: the host's resolvers, public addresses. Nothing like it is for the agent's
    unit: it would drop the reset too with which the filter inside refuses, so programs would hang."""


def unit_internet(
    agents: tuple[Agent, Agent], rules: Ruleset, guard: Guard, host: HostFacts, resolvers: tuple[str, ...]
) -> UnitInternet:
    """Decide how a run under systemd gets its network.

    Args:
        agents: as the run has it, and as the system's policy has it without profile, which the packet filter knows.
        rules: the run's egress rules.
        guard: what is refused to it.
        host: programs. Whether the account may use tap devices is for root to see, before the unit starts.
        resolvers: the host's own.

    Raises:
        UnsupportedError: the host lacks a program, or the packet filter of the account knows other rules.
        PolicyError: rules that this mode cannot keep.
    """
    _refuse_wider(*agents, rules.agent)
    unit = agents[0].unit
    more = (*unit.firewall, *blocked(map(parse_network, unit.block)))
    decided = internet(rules, guard, msgspec.structs.replace(host, tun=True, uid=max(host.uid, 1)), resolvers, more)
    deny = _networks(network for network, _, _ in guard.refused())
    lifted = tuple(map(str, guard.exceptions))
    return UnitInternet(
        internet=decided,
        outside=Addresses(allow=(*resolvers, *_NEIGHBOURS, *lifted), deny=deny),
    )


def _networks(networks: Iterable[Network]) -> tuple[str, ...]:
    """Return networks in order, neighbours joined."""
    texts = {str(network) for network in networks}
    known = [ip_network(text) for text in texts]
    four = collapse_addresses(network for network in known if isinstance(network, IPv4Network))
    six = collapse_addresses(network for network in known if not isinstance(network, IPv4Network))
    return (*map(str, four), *map(str, six))


def _opened(network: Network, private: tuple[str, ...]) -> bool:
    """Say whether a network lies inside one that the account may reach."""
    return any(
        network.version == outer.version and outer.prefixlen <= network.prefixlen and network.network_address in outer
        for outer in map(parse_network, private)
    )


def _refuse_wider(run: Agent, account: Agent, name: str) -> None:
    wanted, kept = direct_rules(run, name), direct_rules(account, name)
    which = ""
    if not kept.internet:
        which = "egress.mode"
    elif not all(_opened(parse_network(text), kept.private) for text in wanted.private):
        which = "egress.private"
    elif not {(str(network), rule.text) for network, rule in kept.deny} <= {
        (str(network), rule.text) for network, rule in wanted.deny
    }:
        which = "egress.deny"
    elif wanted.block != kept.block:
        which = "unit.block"
    elif wanted.statements != kept.statements:
        which = "unit.firewall"
    if which:
        raise UnsupportedError(
            "unit-internet", f"the packet filter knows the agent's account, and this run has another `{which}`",
            where=f".agents.{name}.{which}",
            remedy=f"say it in [agents.{name}] instead of a profile, or make it an agent of its own",
        )  # fmt: skip
