"""The allowlist, compiled: from `[agents.NAME.egress]` to something a connection can be held against.

Names are looked up in dictionaries (exact, then by suffix), addresses in a short list of
networks. A rule knows where it was written, so that every verdict can point at it. Deciding
is for `decision`; this module only finds the rules that speak about a host and port, and says
whether one covers a request.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from cloister.egress import hosts
from cloister.egress.addresses import Guard, Network, parse_network
from cloister.egress.hosts import Address, Host, HostError
from cloister.egress.paths import PathError, PathPattern, canonical_path
from cloister.errors import PolicyError, Problem
from cloister.policy.model import Egress, EgressMode, EgressRule

DEFAULT_PORT = 443
_TOKEN = re.compile(r"[A-Z0-9!#$%&'*+.^_`|~-]{1,32}")
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_MAX_PORT = 65535


class Rule(NamedTuple):
    """One entry of `allow` or `deny`. `port` None means every port; empty methods and paths mean all."""

    text: str
    where: str
    port: int | None
    methods: frozenset[str] = frozenset()
    paths: tuple[PathPattern, ...] = ()

    @property
    def limited(self) -> bool:
        """Whether the rule speaks about methods or paths, which only visible requests have."""
        return bool(self.methods or self.paths)

    def covers(self, method: str, target: str) -> bool:
        """Say whether a visible request is meant by this rule.

        Raises:
            PathError: when the rule has paths and the request's path is ambiguous.
        """
        if self.methods and method not in self.methods:
            return False
        if not self.paths:
            return True
        path = canonical_path(target)
        return any(pattern.matches(path) for pattern in self.paths)


class RuleIndex:
    """Rules by host. Exact names come before wildcards, longer wildcards before shorter ones."""

    def __init__(self) -> None:
        """Start empty; `compile_ruleset` fills it."""
        self._exact: dict[str, list[Rule]] = {}
        self._below: dict[str, list[Rule]] = {}
        self._networks: list[tuple[Network, Rule]] = []

    def add(self, pattern: str | Network, rule: Rule) -> None:
        """Add a rule for a canonical name, `*.name`, or network."""
        if not isinstance(pattern, str):
            self._networks.append((pattern, rule))
        elif pattern.startswith("*."):
            self._below.setdefault(pattern[2:], []).append(rule)
        else:
            self._exact.setdefault(pattern, []).append(rule)

    def about(self, host: Host) -> Iterator[Rule]:
        """Yield the rules about a host, whatever their port."""
        if host.address is not None:
            yield from self.about_address(host.address)
            return
        yield from self._exact.get(host.text, ())
        rest = host.text
        while "." in rest:
            rest = rest.split(".", 1)[1]
            yield from self._below.get(rest, ())

    def about_address(self, address: Address) -> Iterator[Rule]:
        """Yield the rules about networks that hold an address."""
        for network, rule in self._networks:
            if address.version == network.version and address in network:
                yield rule

    def networks(self) -> tuple[tuple[Network, Rule], ...]:
        """Return the rules about addresses, in the order they were written."""
        return tuple(self._networks)

    def names(self) -> tuple[Rule, ...]:
        """Return the rules about names, in the order of their names."""
        tables = (*self._exact.items(), *self._below.items())
        return tuple(rule for _, rules in sorted(tables) for rule in rules)

    def naming(self, name: str) -> tuple[Rule, ...]:
        """Return the rules that name exactly this name: wildcards do not reach reserved names."""
        return tuple(self._exact.get(name, ()))

    def describe(self) -> list[str]:
        """Return the rules as written, in the order of their hosts."""
        listed = [rule for rules in (*self._exact.values(), *self._below.values()) for rule in rules]
        listed += [rule for _, rule in self._networks]
        return sorted({rule.text for rule in listed})


class Ruleset(NamedTuple):
    """A compiled `[agents.NAME.egress]`."""

    mode: EgressMode
    allow: RuleIndex
    deny: RuleIndex
    agent: str = ""


def compile_ruleset(egress: Egress, preset_hosts: tuple[str, ...] = (), *, agent: str = "") -> Ruleset:
    """Compile the table of one agent, with the hosts its preset adds to `allow`.

    A rule without a port means 443 in `allow` and every port in `deny`.

    Raises:
        PolicyError: with every mistake in the table.
    """
    table = f"[agents.{agent}.egress]" if agent else "[egress]"
    problems: list[Problem] = []
    ruleset = Ruleset(egress.mode, RuleIndex(), RuleIndex(), agent)
    for key, index, entries in (("allow", ruleset.allow, egress.allow), ("deny", ruleset.deny, egress.deny)):
        for number, entry in enumerate(entries):
            _add(index, entry, f"{table} {key}[{number}]", problems)
    for number, entry in enumerate(preset_hosts):
        _add(ruleset.allow, entry, f"preset hosts[{number}]", problems)
    if problems:
        raise PolicyError(problems, reference="egress-invalid")
    return ruleset


def compile_guard(
    egress: Egress, own: tuple[Address, ...] = (), attached: tuple[Network, ...] = (), *, agent: str = ""
) -> Guard:
    """Build the address guard from `egress.private`, the host's own addresses and the networks it is attached to.

    Of the latter only public ones count: the others are refused anyway, and an exception as wide as
    `10.0.0.0/8` is meant to open what is attached there.

    Raises:
        PolicyError: for an entry that is no network, or lies in no refused range and so would mean nothing.
    """
    table = f"[agents.{agent}.egress]" if agent else "[egress]"
    known = Guard()
    public = [network for network in attached if known.check(network.network_address) is None]
    bare, problems, networks = Guard(own, (), public), [], []
    for number, text in enumerate(egress.private):
        where = f"{table} private[{number}]"
        try:
            network = parse_network(text)
        except ValueError:
            problems.append(Problem(f"'{text}' is not an address or CIDR", where, 'write it as "192.168.1.20/32"'))
            continue
        if bare.lifts_something(network):
            networks.append(network)
        else:
            remedy = "name one range or address inside a refused range, or remove it"
            problems.append(Problem(f"'{text}' lies inside no refused range", where, remedy))
    if problems:
        raise PolicyError(problems, reference="egress-invalid")
    return Guard(own, networks, public)


def _add(index: RuleIndex, entry: str | EgressRule, where: str, problems: list[Problem]) -> None:
    """Compile one entry into the index, or note what is wrong with it."""
    try:
        pattern, rule = _compile(entry, where, deny=" deny[" in where)
    except (HostError, PathError) as error:
        shown = entry if isinstance(entry, str) else entry.host
        remedy = (
            'write "name", "name:port", "*.name:port", an address or a CIDR (for everything, set mode = "internet")'
        )
        problems.append(Problem(f"'{shown}' is no rule: {error}", where, remedy))
    else:
        index.add(pattern, rule)


def _compile(entry: str | EgressRule, where: str, *, deny: bool) -> tuple[str | Network, Rule]:
    """Compile one entry into what it names and the rule about it."""
    if isinstance(entry, EgressRule):
        pattern, extra = _split(entry.host)
        if extra is not None or (entry.port is not None and not 1 <= entry.port <= _MAX_PORT):
            raise HostError("the port stands in 'port', as a number from 1 to 65535")
        if entry.port is None and pattern == hosts.HOST_LOOPBACK_NAME and not deny:
            raise HostError("the host's loopback is opened one port at a time; write the port")
        return pattern, _long_rule(entry, where, entry.port if deny else entry.port or DEFAULT_PORT)
    pattern, port = _split(entry)
    if port is None and pattern == hosts.HOST_LOOPBACK_NAME and not deny:
        raise HostError("the host's loopback is opened one port at a time; write the port")
    return pattern, Rule(entry, where, port if deny else port or DEFAULT_PORT)


def _long_rule(entry: EgressRule, where: str, port: int | None) -> Rule:
    """Build a rule from the long form."""
    methods = frozenset(method.upper() for method in entry.methods)
    for method in methods:
        if not _TOKEN.fullmatch(method):
            raise HostError(f"'{method}' is not an HTTP method")
    paths = tuple(PathPattern(path) for path in entry.paths)
    limits = [" ".join(sorted(methods)), " ".join(entry.paths)]
    text = " ".join(part for part in (f"{entry.host}:{entry.port}", *limits) if part)
    return Rule(text, where, port, methods, paths)


def _split(text: str) -> tuple[str | Network, int | None]:
    """Split an entry into what it names and its port, if it has one."""
    head, port = text, None
    before, colon, after = text.rpartition(":")
    if colon and (":" not in before or before.startswith("[")) and "]" not in after:
        if not _PORT.fullmatch(after) or int(after) > _MAX_PORT:
            raise HostError("the port is not a number from 1 to 65535")
        head, port = before, int(after)
    if "/" in head:
        try:
            return parse_network(head.removeprefix("[").replace("]", "")), port
        except ValueError as error:
            raise HostError(str(error)) from None
    wildcard = head.startswith("*.")
    host = hosts.parse_host(head[2:] if wildcard else head)
    if host.address is not None:
        if wildcard:
            raise HostError("an address has no names below it")
        return parse_network(host.text), port
    return f"*.{host.text}" if wildcard else host.text, port
