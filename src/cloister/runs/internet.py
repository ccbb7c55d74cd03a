"""Mode `internet`, decided: the packet filter, pasta's argv, and what the mode cannot keep.

The run gets a network namespace of its own. nft refuses in it what the address guard refuses,
pasta carries the rest to the host's sockets without any privilege, and the sandbox below holds
no capability over either. The proxy stays: what goes through it is decided and recorded by
name, what goes directly is only counted. Nothing is started here (`runs/attach.py`).
"""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address

import msgspec

from cloister.egress import nft
from cloister.egress.addresses import Guard
from cloister.egress.rules import Rule, Ruleset
from cloister.errors import PolicyError, Problem, UnsupportedError
from cloister.isolation.inner import PROBE_ADDRESS
from cloister.plan.facts import HostFacts
from cloister.runs import remedies

# Documentation addresses (RFC 5737, RFC 3849): the agent learns neither the host's addresses nor its routes from them.
SOURCE = "192.0.2.2"
SOURCE_IPV6 = "2001:db8::2"
GATEWAY_IPV6 = "2001:db8::1"
ADDRESSES = ("-a", SOURCE, "-n", "255.255.255.0", "-g", "192.0.2.1", "-a", SOURCE_IPV6, "-g", GATEWAY_IPV6)
RESOLVER = "192.0.2.53"
RESOLVER_IPV6 = "2001:db8::53"
INTERFACE = "net0"
GATEWAY_MAC = "02:00:00:00:00:01"
PROBES = (PROBE_ADDRESS, "169.254.169.254:80", "10.255.255.1:9", "172.16.0.1:9", "192.168.255.1:9", "[fd00::1]:9")
"""One address per kind of network; those that the policy opens are left out."""
OPT_OUT = "egress.mode = internet: public addresses are reachable without names; direct connections are only counted"
WORDS = "every public address, directly: any port over TCP and UDP"


class Internet(msgspec.Struct, frozen=True, kw_only=True):
    """What a run in this mode needs beyond the others."""

    ruleset: str
    pasta: tuple[str, ...]
    """pasta's argv without the process it attaches to."""
    nft: str
    """Path of nft."""
    resolver: str
    probes: tuple[str, ...]
    notices: tuple[str, ...] = ()


def internet(
    rules: Ruleset, guard: Guard, host: HostFacts, resolvers: tuple[str, ...], more: tuple[str, ...] = ()
) -> Internet:
    """Decide how a run in mode `internet` gets its network.

    Args:
        rules: the agent's egress rules; those that direct connections would walk around are refused.
        guard: what is refused, on the proxy and in the packet filter alike.
        host: programs, and whether tap devices can be made.
        resolvers: the host's own, which pasta asks.
        more: further statements for the packet filter, which refuse or count.

    Raises:
        UnsupportedError: the host lacks a program, or may not use tap devices.
        PolicyError: rules that this mode cannot keep.
    """
    _refuse_host(host)
    _refuse_rules(rules, guard)
    resolver = _resolver(resolvers)
    sources = (ip_address(SOURCE), ip_address(SOURCE_IPV6))
    return Internet(
        ruleset=nft.ruleset(guard, rules.deny.networks(), ip_address(resolver), sources, more),
        pasta=pasta_argv(host.pasta.path, resolver, is_root=host.uid == 0),
        nft=host.nft.path,
        resolver=resolver,
        probes=tuple(probe for probe in PROBES if guard.check(ip_address(probe.rpartition(":")[0].strip("[]")))),
        notices=() if resolvers else ("the host has no resolver in /etc/resolv.conf: names resolve by the proxy only",),
    )


def pasta_argv(path: str, resolver: str, *, is_root: bool) -> tuple[str, ...]:
    """Return pasta's argv (pasta(1)); it writes its process id to stdout once the network is up.

    No port is forwarded in either direction, and no address stands for the host's loopback.
    """
    shut = (
        "--no-map-gw",
        "-t",
        "none",
        "-u",
        "none",
        "-T",
        "none",
        "-U",
        "none",
        "--no-dhcp",
        "--no-dhcpv6",
        "--no-ra",
    )
    shown = ("-I", INTERFACE, "-M", GATEWAY_MAC, *ADDRESSES, "--dns-forward", resolver)
    user = ("--runas", "0:0") if is_root else ()  # else it turns into nobody, who cannot enter the namespaces
    return (path, "-f", "-q", "--config-net", *shut, *shown, *user, "-P", "/dev/stdout")


def _resolver(resolvers: tuple[str, ...]) -> str:
    """Return the address that stands for the host's resolver: pasta translates within one version of IP."""
    only_ipv6 = bool(resolvers) and all(isinstance(ip_address(text), IPv6Address) for text in resolvers)
    return RESOLVER_IPV6 if only_ipv6 else RESOLVER


def _refuse_host(host: HostFacts) -> None:
    for name, program in (("pasta", host.pasta), ("nft", host.nft)):
        if not program.path:
            found = f"; {program.refused} is not trusted, others could change it" if program.refused else ""
            raise UnsupportedError(
                "internet-unavailable", f'mode = "internet" needs {name}, which is not installed{found}',
                where=".egress.mode", remedy=remedies.INSTALL_INTERNET,
            )  # fmt: skip
    if not host.tun:
        raise UnsupportedError(
            "internet-unavailable", 'mode = "internet" needs tap devices, and you may not open /dev/net/tun',
            where=".egress.mode", remedy=remedies.TUN,
        )  # fmt: skip


def _refuse_rules(rules: Ruleset, guard: Guard) -> None:
    """Refuse what holds on the proxy alone: a direct connection has no name, method or path."""
    table = f"[agents.{rules.agent}.egress]"
    why = 'mode = "internet" lets the agent connect without names'
    problems = [
        Problem(
            f"{why}, so the deny rule '{rule.text}' would not hold", rule.where, 'deny addresses, or use mode = "learn"'
        )
        for rule in rules.deny.names()
    ]
    limited = [rule for rule in (*rules.allow.names(), *_address_rules(rules)) if rule.limited]
    problems += [
        Problem(f"{why}, so the methods and paths of '{rule.text}' would not hold", rule.where, 'use mode = "learn"')
        for rule in limited
    ]
    problems += [
        Problem(
            f"'{network}' embeds IPv4 addresses, which the packet filter cannot judge", f"{table} private", "remove it"
        )
        for network in nft.lifted_embedding(guard)
    ]
    if problems:
        raise PolicyError(problems, reference="egress-not-enforceable")


def _address_rules(rules: Ruleset) -> tuple[Rule, ...]:
    return tuple(rule for _, rule in rules.allow.networks())
