"""One decision for all protocols: may this run talk to that host, port, method and path?

`decide` is asked before a name is resolved, `admit` for every address the name then has. A
verdict names the rule or the reason, explains it in a sentence, and says which policy line
would change it. Order: reserved names, deny rules, allow rules, answers the user gave during
the run, then the mode. A host that an allow rule names with methods or paths keeps these
limits in every mode. Nothing here resolves, connects or asks anyone.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Literal

import msgspec

from cloister.egress import hosts
from cloister.egress.addresses import Guard, Refusal
from cloister.egress.hosts import Address, Host
from cloister.egress.paths import PathError
from cloister.egress.rules import Rule, Ruleset

Protocol = Literal["http", "https", "connect", "socks5"]
"""`https` is a request inside TLS that ends at the broker; TLS that passes is `connect` or `socks5`."""
Action = Literal["allow", "deny", "ask"]


class Target(msgspec.Struct, frozen=True):
    """Where a client wants to go. `method` and `path` are known for requests only; a tunnel hides them."""

    protocol: Protocol
    host: Host
    port: int
    method: str = ""
    path: str = ""
    inspected: bool = False
    """A tunnel whose TLS ends here: rules about methods and paths are held against the requests inside."""

    @property
    def visible(self) -> bool:
        """Whether this is one request, with method and path."""
        return self.protocol in {"http", "https"}

    @property
    def place(self) -> tuple[str, int]:
        """Host and port: what an answer of the user is about."""
        return (self.host.text, self.port)

    @property
    def authority(self) -> str:
        """`host:port` as written in a rule."""
        return self.host.authority(self.port)


class Verdict(msgspec.Struct, frozen=True):
    """What was decided and why. `reason` is a kebab-case word that does not change between versions."""

    action: Action
    reason: str
    rule: str = ""
    explanation: str = ""
    remedy: str = ""

    @property
    def allowed(self) -> bool:
        """Whether the connection may go on without asking."""
        return self.action == "allow"


def decide(
    rules: Ruleset, guard: Guard, target: Target, *, granted: Container[tuple[str, int]] = (),
    refused: Container[tuple[str, int]] = (),
) -> Verdict:  # fmt: skip
    """Decide about a target before its name is resolved.

    Args:
        rules: the compiled allowlist.
        guard: judges the target itself when it is an address literal.
        target: where the client wants to go.
        granted: places the user allowed for this run.
        refused: places the user refused for this run.
    """
    if target.host.address is None and hosts.is_reserved(target.host.text):
        return _reserved(rules, target)
    denied = _deny_rule(rules, target)
    if denied is not None:
        return denied
    allowed = _allow_rule(rules, target)
    if allowed is None:
        allowed = _by_mode(rules, target, granted, refused)
    if allowed.action != "deny" and target.host.address is not None:
        return admit(rules, guard, target, target.host.address) or allowed
    return allowed


def admit(rules: Ruleset, guard: Guard, target: Target, address: Address) -> Verdict | None:
    """Judge an address an allowed name resolved to; return a denial, or None when it may be dialled."""
    for rule in rules.deny.about_address(address):
        if rule.port in {None, target.port} and not rule.limited:
            return _denied_by(rule, f"{target.host.text} leads to {address}, which a deny rule names")
    refusal = guard.check(address)
    return None if refusal is None else _address_refused(rules, target, address, refusal)


def allow_line(target: Target) -> str:
    """Return the entry of `egress.allow` that would allow a target."""
    port = target.port
    if target.host.text == hosts.HOST_LOOPBACK_NAME or port != 443:  # noqa: PLR2004 - the default of the model
        return f'"{target.authority}"'
    return f'"{target.host.text}"'


def _remedy(rules: Ruleset, entry: str, key: str = "allow") -> str:
    """Return an edit to make."""
    table = f"[agents.{rules.agent}.egress]" if rules.agent else "[agents.NAME.egress]"
    return f"add {entry} to {key} in {table}"


def _reserved(rules: Ruleset, target: Target) -> Verdict:
    """Decide about `cloister.internal` and the names below it: only exact rules with a port reach them."""
    name = target.host.text
    if name == hosts.PROXY_NAME and target.protocol == "http" and target.port == 80:  # noqa: PLR2004
        return Verdict("allow", "proxy-status", explanation="the proxy itself")
    if name != hosts.HOST_LOOPBACK_NAME:
        return Verdict("deny", "reserved-name", explanation=f"{name} is reserved for the proxy")
    if any(rule.port in {None, target.port} for rule in rules.deny.naming(name)):
        return Verdict("deny", "denied-by-rule", explanation="a deny rule names this port of the host's loopback")
    reasons = [_judge(rule, target) for rule in rules.allow.naming(name) if rule.port == target.port]
    for verdict in reasons:
        if verdict.allowed:
            return verdict
    if reasons:
        return reasons[0]
    why = "a port of the host's own loopback is reached only by a rule that names it"
    return Verdict("deny", "not-in-allowlist", explanation=why, remedy=_remedy(rules, allow_line(target)))


def _deny_rule(rules: Ruleset, target: Target) -> Verdict | None:
    """Return a denial by the first deny rule that covers the target, or might."""
    for rule in rules.deny.about(target.host):
        if rule.port not in {None, target.port}:
            continue
        if not rule.limited:
            return _denied_by(rule, f"a deny rule names {target.host.text}")
        if not target.visible:
            if target.inspected:
                continue
            return _denied_by(rule, "a deny rule about methods or paths cannot be checked inside a tunnel")
        try:
            if rule.covers(target.method, target.path):
                return _denied_by(rule, "a deny rule names this request")
        except PathError as error:
            return _denied_by(rule, f"a deny rule names paths of this host, and this one is ambiguous: {error}")
    return None


def _allow_rule(rules: Ruleset, target: Target) -> Verdict | None:
    """Return what the allow rules about this host and port say, or None when there is none."""
    first: Verdict | None = None
    for rule in rules.allow.about(target.host):
        if rule.port != target.port:
            continue
        verdict = _judge(rule, target)
        if verdict.allowed:
            return verdict
        first = first or verdict
    return first


def _judge(rule: Rule, target: Target) -> Verdict:
    """Hold a target against one allow rule of its host and port."""
    allowed = Verdict("allow", "allowed-by-rule", f"{rule.text} ({rule.where})")
    if not rule.limited:
        return allowed
    if target.inspected:
        return allowed
    if not target.visible:
        why = "the rule limits methods or paths, and a tunnel hides both"
        return _limited("needs-inspection", rule, why, f"remove methods and paths from {rule.where}")
    try:
        if rule.covers(target.method, target.path):
            return allowed
    except PathError as error:
        return _limited("path-ambiguous", rule, f"{error}, and the rule limits paths", "request the plain path")
    if rule.methods and target.method not in rule.methods:
        why = f"{target.method} is not among the methods of the rule"
        return _limited("method-not-allowed", rule, why, f'add "{target.method}" to methods of {rule.where}')
    why = "the path matches none of the rule's patterns"
    return _limited("path-not-allowed", rule, why, f"add a pattern for this path to paths of {rule.where}")


def _by_mode(
    rules: Ruleset, target: Target, granted: Container[tuple[str, int]], refused: Container[tuple[str, int]]
) -> Verdict:
    """Decide about a target that no rule speaks of."""
    remedy = _remedy(rules, allow_line(target))
    if target.place in refused:
        return Verdict("deny", "denied-by-user", explanation="the user refused this host for this run", remedy=remedy)
    if target.place in granted:
        return Verdict("allow", "allowed-by-user", explanation="the user allowed this host for this run")
    if rules.mode == "ask":
        return Verdict("ask", "not-in-allowlist", explanation="no rule names this host", remedy=remedy)
    if rules.mode in {"learn", "internet"}:
        if target.host.address is not None or hosts.is_public_name(target.host.text):
            return Verdict("allow", "allowed-by-mode", f"mode = {rules.mode}")
        why = "this name is not part of the public DNS, and the mode opens public hosts only"
        return Verdict("deny", "local-name", explanation=why, remedy=remedy)
    if any(rules.allow.about(target.host)):
        why = f"{target.host.text} is allowed on other ports only"
        return Verdict("deny", "port-not-allowed", explanation=why, remedy=remedy)
    return Verdict("deny", "not-in-allowlist", explanation="no rule names this host", remedy=remedy)


def _denied_by(rule: Rule, why: str) -> Verdict:
    """Build a denial by a deny rule."""
    return Verdict("deny", "denied-by-rule", f"{rule.text} ({rule.where})", why, f"remove or narrow {rule.where}")


def _limited(reason: str, rule: Rule, why: str, remedy: str) -> Verdict:
    """Build a denial by an allow rule that names the host but not this request."""
    return Verdict("deny", reason, f"{rule.text} ({rule.where})", why, remedy)


def _address_refused(rules: Ruleset, target: Target, address: Address, refusal: Refusal) -> Verdict:
    """Build a denial by the address guard."""
    leads = "" if target.host.address == address else f"{target.host.text} leads to {address}: "
    inner = "" if refusal.address == address else f" through {refusal.address}"
    why = f"{leads}{refusal.network} is refused{inner}, {refusal.why}"
    if refusal.kind == "metadata":
        remedy = ""  # nobody should be talked into opening the keys of the machine
    elif refusal.kind == "network":
        remedy = _remedy(rules, f'"{refusal.address}/{refusal.address.max_prefixlen}"', "private")
    else:
        entry = f'"{hosts.HOST_LOOPBACK_NAME}:{target.port}"'
        remedy = f"{_remedy(rules, entry)}, and use that name for services of the host"
    return Verdict("deny", "address-refused", str(refusal.network), why, remedy)
