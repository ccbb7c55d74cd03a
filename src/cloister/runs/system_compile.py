"""From the system's policy to a system as it shall be: accounts, grants, files and units.

Pure: policy and facts come in, `Desired` goes out, and the same input always gives the same. What may be installed at
all is `system_judge`; finding out what differs is `plan/system_diff.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address

import msgspec

from cloister.egress import nft_bridge
from cloister.egress.addresses import parse_network
from cloister.errors import PolicyError, UnsupportedError
from cloister.identity.accounts import Entry, Owner, assign, find
from cloister.isolation import unit_files
from cloister.isolation.audit_units import audit_units, audit_wanted
from cloister.isolation.bridge_units import PATH as BRIDGE_UNIT_PATH
from cloister.isolation.bridge_units import bridge_unit, bridge_wanted
from cloister.isolation.export_units import export_units, export_wanted
from cloister.isolation.firewall_units import firewall_unit, watchdog_unit
from cloister.isolation.sensor_units import sensor_units, sensor_wanted
from cloister.isolation.unit_files import DaemonFacts
from cloister.plan import bridge
from cloister.plan.bridge import DEFAULT_NETWORK
from cloister.plan.firewall import FIREWALL_UNIT, WATCHDOG_UNIT
from cloister.plan.service_facts import ServiceUnits
from cloister.plan.system_diff import Desired, File, Wanted
from cloister.plan.system_facts import SystemFacts
from cloister.plan.unit import DAEMON_USERS, SYSTEM_FILE, Account, Grant, System, VmBridge, delivered_name
from cloister.policy.model import Audit, Policy
from cloister.runs.compile_parts import is_nested
from cloister.runs.firewall_compile import compile_firewall
from cloister.runs.system_judge import SystemPolicy, problems, references, refuse_host
from cloister.runs.system_services import directories_of, files_of, units_of


def give_accounts(source: SystemPolicy, facts: SystemFacts, recorded: Iterable[Account]) -> tuple[Account, ...]:
    """Return all accounts there shall be: recorded ones, and new ones.

    Raises:
        UnsupportedError: this host cannot have them, or nothing at all of this (`system_judge.refuse_host`).
        PolicyError: `system-policy-invalid`, with every mistake found.
    """
    refuse_host(facts)
    if found := problems(source, facts):
        raise PolicyError(found, reference="system-policy-invalid")
    owners = [Owner(agent, user) for user, agent, _ in _granted(source.policy)]
    accounts = assign([*owners, *source.served], recorded, [Entry(*entry) for entry in facts.entries])
    for account in accounts:
        if account.name in facts.subordinate:
            message = f"{account.name} has subordinate ids: with those it could take other numbers than its own"
            remedy = f"take {account.name} out of /etc/subuid and /etc/subgid"
            raise UnsupportedError("account-changed", message, where="/etc/subuid", remedy=remedy)
    return accounts


def compile_system(
    source: SystemPolicy, facts: SystemFacts, accounts: tuple[Account, ...], services: Iterable[ServiceUnits] = ()
) -> Desired:
    """Return the system that a policy wants.

    Args:
        source: the system's policy.
        facts: of this host.
        accounts: as `give_accounts` returned them.
        services: what is installed for each gateway.

    Raises:
        UnsupportedError: `no-nftables`.
        PolicyError: `firewall-invalid`, with every mistake found.
    """
    services = tuple(services)
    grants = _grants(source, accounts)
    granted = {grant.account for grant in grants} | {one.account for one in services}
    made = tuple(account for account in accounts if account.name in granted or _known(account, facts))
    daemons = _daemon_facts(facts)
    real, links = unit_files.skeleton(daemons)
    runtime = (*unit_files.runtime_directories(), *real)
    credentials, renewed = _credentials(source, facts)
    filtered = _firewall(source, accounts, facts)
    audit, connected = source.policy.audit, _bridge(source.policy)
    system = System(policy_digest=source.digest, accounts=accounts, grants=grants, audit=audit.on_failure,
                    bridge=connected)  # fmt: skip
    files = {
        unit_files.SYSUSERS: unit_files.sysusers(made),
        unit_files.TMPFILES: unit_files.tmpfiles(runtime, links),
        SYSTEM_FILE: msgspec.json.format(msgspec.json.encode(system), indent=1).decode() + "\n",
        **unit_files.daemon_units(daemons, credentials),
        **_audit_files(daemons, audit),
        **_filter_files(filtered, facts),
    }
    served = {account.service: account for account in accounts if account.service}
    further = (*_bridge_files(connected, facts), *files_of(services, served))
    directories = (*unit_files.fixed_directories(), *runtime, *directories_of(services))
    return Desired(
        accounts=made,
        daemons=tuple(DAEMON_USERS),
        directories=tuple({one.path: one for one in directories}.values()),
        links=links,
        files=(*(File(path=path, text=text) for path, text in files.items()), *further),
        denied=tuple(account.name for account in accounts),
        firewall=filtered,
        units=(*_audit_wanted(audit), *_filter_units(filtered), *_bridge_units(connected), *_daemons(renewed),
               *units_of(services)),
        stop=_not_granted(facts, granted),
    )  # fmt: skip


def _not_granted(facts: SystemFacts, granted: set[str]) -> tuple[tuple[str, str], ...]:
    """Return the runs that end, with the reason."""
    return tuple((unit, f"{account} is not granted any more") for unit, account in facts.runs if account not in granted)


def _audit_files(daemons: DaemonFacts, audit: Audit) -> dict[str, str]:
    """Return the units of the audit: keeper, sensor, and what sends its log elsewhere."""
    return {**audit_units(daemons, audit), **sensor_units(daemons, audit), **export_units(daemons, audit)}


def _audit_wanted(audit: Audit) -> tuple[Wanted, ...]:
    """Return the audit's units before all others: what sends its log elsewhere, its keeper, the kernel's part."""
    return (*export_wanted(audit), *audit_wanted(), *sensor_wanted())


def _granted(policy: Policy) -> list[tuple[str, str, tuple[str, ...]]]:
    """Return user, agent and roots of each grant."""
    return [
        (user, agent, table.roots)
        for user, table in policy.users.items()
        for agent in table.agents
        if policy.agents[agent].isolation == "unit"
    ]


def _grants(source: SystemPolicy, accounts: tuple[Account, ...]) -> tuple[Grant, ...]:
    """Return who may start what where as whom, and what of a unit's hardening the policy lifts."""
    return tuple(
        Grant(
            user=user, agent=agent, account=find(accounts, Owner(agent, user)).name, roots=roots,
            nested=_may_nest(source, agent),
            network=source.agents[agent].egress.mode == "internet",
        )
        for user, agent, roots in _granted(source.policy)
    )  # fmt: skip


def _may_nest(source: SystemPolicy, agent: str) -> bool:
    """Say whether the agent, or any profile that could be laid over it, builds sandboxes of its own."""
    return any(is_nested(one) for one in (source.agents[agent], *source.policy.profiles.values()))


def _daemons(renewed: str) -> tuple[Wanted, ...]:
    hostd, proxyd = f"{unit_files.UNITS}/{unit_files.HOSTD}", f"{unit_files.UNITS}/{unit_files.PROXYD}"
    broker = Wanted(
        unit=f"{unit_files.PROXYD}.service", enabled=False, active=False,
        restart_for=(f"{proxyd}.service",), reload_for=(SYSTEM_FILE,), restart_why=renewed,
    )  # fmt: skip
    host = f"{unit_files.HOSTD}.service"
    return (  # sockets are stopped first: a request would start the service again
        broker,
        Wanted(unit=f"{unit_files.PROXYD}.socket", restart_for=(f"{proxyd}.socket",)),
        Wanted(unit=host, enabled=False, active=False, restart_for=(f"{hostd}.service",)),
        Wanted(unit=f"{unit_files.HOSTD}.socket", restart_for=(f"{hostd}.socket",)),
    )


def _firewall(source: SystemPolicy, accounts: tuple[Account, ...], facts: SystemFacts) -> str | None:
    """Return the packet filter; none where there is no account yet."""
    if not accounts:
        return None
    if not facts.nft:
        message = "nft is not installed: nothing would hold the agents' accounts back outside of their units"
        raise UnsupportedError("no-nftables", message, remedy="apt install nftables")
    attached = tuple(parse_network(text) for text in facts.attached)
    return compile_firewall(accounts, source.agents, attached, tuple(ip_address(text) for text in facts.resolvers))


def _filter_files(filtered: str | None, facts: SystemFacts) -> dict[str, str]:
    if filtered is None:
        return {}
    return {
        f"{unit_files.UNITS}/{FIREWALL_UNIT}": firewall_unit(facts.nft),
        f"{unit_files.UNITS}/{WATCHDOG_UNIT}": watchdog_unit(facts.python),
    }


def _filter_units(filtered: str | None) -> tuple[Wanted, ...]:
    if filtered is None:
        return ()
    paths = {unit: f"{unit_files.UNITS}/{unit}" for unit in (FIREWALL_UNIT, WATCHDOG_UNIT)}
    return tuple(Wanted(unit=unit, restart_for=(path,)) for unit, path in paths.items())


def _bridge(policy: Policy) -> VmBridge | None:
    """Return the bridge of microVMs; none where the policy does not ask for it."""
    table = policy.microvm
    return VmBridge(network=table.bridge or DEFAULT_NETWORK, users=table.users) if table.users else None


def _bridge_units(connected: VmBridge | None) -> tuple[Wanted, ...]:
    return (bridge_wanted(),) if connected else ()


def _daemon_facts(facts: SystemFacts) -> DaemonFacts:
    return DaemonFacts(python=facts.python, root_links=facts.root_links, root_directories=facts.root_directories)


def _bridge_files(connected: VmBridge | None, facts: SystemFacts) -> tuple[File, ...]:
    if connected is None:
        return ()
    if not facts.nft:
        message = "nft is not installed: nothing would hold microVMs on the bridge back"
        raise UnsupportedError("no-nftables", message, remedy="apt install nftables")
    return (
        File(path=bridge.FILE, text=nft_bridge.ruleset(), mode=0o600),
        File(path=BRIDGE_UNIT_PATH, text=bridge_unit(facts.python, connected.network)),
    )


def _known(account: Account, facts: SystemFacts) -> bool:
    """Whether the host has it: one that is not granted any more stays, and is not made again."""
    return (account.name, account.uid) in facts.entries


def _credentials(source: SystemPolicy, facts: SystemFacts) -> tuple[list[tuple[str, str]], str]:
    """Return what the system's broker gets by LoadCredential=, and why it must be restarted for it, if it must.

    A file of root's reaches it by systemd, which reads it when the broker starts. One that belongs to the broker's
    own user is read by itself at each use, so that a new key counts at once.
    """
    found: list[tuple[str, str]] = []
    renewed = ""
    for one in references(source):
        scheme, _, target = one.text.partition(":")
        if scheme == "systemd":
            found.append((target, ""))
        if scheme != "file" or facts.keys[target].uid != 0:
            continue
        found.append((delivered_name(target), target))
        if 0 < facts.proxyd_since < facts.keys[target].changed:
            renewed = f"{target} is newer than it"
    return sorted(set(found)), renewed
