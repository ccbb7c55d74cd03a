"""From the system's policy to a system as it shall be: accounts, grants, files and units.

Pure: policy and facts come in, `Desired` goes out, and the same input always gives the same. This is where what may
be installed is judged: an interpreter that others could change, users that do not exist, keys that the broker could
not read. Finding out what differs is `plan/system_diff.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

import msgspec

from cloister.egress.addresses import parse_network
from cloister.errors import PolicyError, Problem, UnsupportedError
from cloister.identity.accounts import Entry, Owner, assign, find
from cloister.isolation import unit_files
from cloister.isolation.firewall_units import firewall_unit, watchdog_unit
from cloister.isolation.unit_files import DaemonFacts
from cloister.plan.firewall import FIREWALL_UNIT, WATCHDOG_UNIT
from cloister.plan.system_diff import Desired, File, Wanted
from cloister.plan.system_facts import SystemFacts
from cloister.plan.unit import ACCOUNT_PREFIX, PROXY_USER, SYSTEM_FILE, Account, Grant, System, delivered_name
from cloister.policy.model import Agent, Policy
from cloister.runs import remedies
from cloister.runs.firewall_compile import compile_firewall

OLDEST_SYSTEMD = 252
"""Debian 12; below it properties are missing that runs need."""


class Reference(msgspec.Struct, frozen=True):
    """A secret reference of the policy, and where it stands."""

    where: str
    text: str


class SystemPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """The system's policy, read and checked."""

    policy: Policy
    agents: dict[str, Agent]
    """Those that run as system users, presets folded in."""
    digest: str


def compile_system(source: SystemPolicy, facts: SystemFacts, recorded: Iterable[Account]) -> Desired:
    """Return the system that a policy wants.

    Args:
        source: the system's policy.
        facts: of this host.
        recorded: accounts that were written down before, also those that nobody uses.

    Raises:
        UnsupportedError: this host cannot have it: no systemd, an installation that others could change.
        PolicyError: `system-policy-invalid` or `firewall-invalid`, with every mistake found.
    """
    policy = source.policy
    refuse_host(facts)
    problems = _problems(policy, facts)
    if problems:
        raise PolicyError(problems, reference="system-policy-invalid")
    granted = [
        (user, agent, table.roots)
        for user, table in policy.users.items()
        for agent in table.agents
        if policy.agents[agent].isolation == "unit"
    ]
    owners = [Owner(agent, user) for user, agent, _ in granted]
    accounts = assign(owners, recorded, [Entry(*entry) for entry in facts.entries])
    grants = tuple(
        Grant(user=user, agent=agent, account=find(accounts, Owner(agent, user)).name, roots=roots)
        for user, agent, roots in granted
    )
    system = System(policy_digest=source.digest, accounts=accounts, grants=grants)
    return _desired(source, system, facts)


def refuse_host(facts: SystemFacts) -> None:
    """Refuse a host on which nothing can be installed.

    Raises:
        UnsupportedError: `no-systemd`, `systemd-too-old`, `installation-changeable`, `no-helper`, `no-sysusers`.
    """
    if not facts.systemd_booted:
        message = f"the service manager is {facts.pid1 or 'unknown'}, not systemd: there are no units here"
        remedy = 'isolation = "namespace" needs none of this'
        raise UnsupportedError("no-systemd", message, remedy=remedy)
    if facts.systemd_version < OLDEST_SYSTEMD:
        message = f"systemd {facts.systemd_version} is older than {OLDEST_SYSTEMD}"
        raise UnsupportedError("systemd-too-old", message, remedy="upgrade the system (Debian 12 has 252)")
    if facts.changeable:
        raise UnsupportedError(
            "installation-changeable",
            "others than root could change the program that root's daemon would run",
            where=facts.changeable,
            remedy="sudo make install (into /opt/cloister), then sudo /usr/local/bin/cloister setup",
        )
    if not facts.shim:
        message = "cloister-shim, the first process of each unit, was not built with this installation"
        raise UnsupportedError("no-helper", message, remedy=remedies.REINSTALL)
    if not facts.sysusers:
        message = "neither systemd-sysusers nor useradd is installed"
        raise UnsupportedError("no-sysusers", message, remedy="apt install passwd")


def unit_agents(policy: Policy) -> dict[str, Agent]:
    """Return the agents that run as system users."""
    return {name: agent for name, agent in policy.agents.items() if agent.isolation == "unit"}


def references(policy: Policy) -> tuple[Reference, ...]:
    """Return every secret that the system's broker needs for agents of its own."""
    agents = unit_agents(policy)
    used = dict.fromkeys(name for agent in agents.values() for name in agent.llm.providers)
    found = [
        Reference(f".providers.{name}.key", policy.providers[name].key) for name in used if name in policy.providers
    ]
    found += [
        Reference(f".agents.{agent}.credentials.{name}.secret", credential.secret)
        for agent, table in agents.items()
        for name, credential in table.credentials.items()
    ]
    if agents:
        found.append(Reference(".ledger.database", policy.ledger.database))
    return tuple(one for one in found if one.text)


def key_paths(policy: Policy) -> tuple[str, ...]:
    """Return the files among them."""
    targets = (one.text.partition(":") for one in references(policy))
    return tuple(dict.fromkeys(path for scheme, _, path in targets if scheme == "file"))


def _firewall(source: SystemPolicy, accounts: tuple[Account, ...], facts: SystemFacts) -> str | None:
    """Return the packet filter; none where there is no account yet."""
    if not accounts:
        return None
    if not facts.nft:
        message = "nft is not installed: nothing would hold the agents' accounts back outside of their units"
        raise UnsupportedError("no-nftables", message, remedy="apt install nftables")
    return compile_firewall(accounts, source.agents, tuple(parse_network(text) for text in facts.attached))


def _desired(source: SystemPolicy, system: System, facts: SystemFacts) -> Desired:
    daemons = DaemonFacts(python=facts.python, root_links=facts.root_links, root_directories=facts.root_directories)
    real, links = unit_files.skeleton(daemons)
    runtime = (*unit_files.runtime_directories(), *real)
    credentials, renewed = _credentials(source.policy, facts)
    units = unit_files.daemon_units(daemons, credentials)
    granted = {grant.account for grant in system.grants}
    accounts = tuple(account for account in system.accounts if account.name in granted or _known(account, facts))
    files = {
        unit_files.SYSUSERS: unit_files.sysusers(accounts),
        unit_files.TMPFILES: unit_files.tmpfiles(runtime, links),
        SYSTEM_FILE: msgspec.json.format(msgspec.json.encode(system), indent=1).decode() + "\n",
        **units,
    }
    filtered = _firewall(source, system.accounts, facts)
    if filtered is not None:
        files[f"{unit_files.UNITS}/{FIREWALL_UNIT}"] = firewall_unit(facts.nft)
        files[f"{unit_files.UNITS}/{WATCHDOG_UNIT}"] = watchdog_unit(facts.python)
    hostd, proxyd = f"{unit_files.UNITS}/{unit_files.HOSTD}", f"{unit_files.UNITS}/{unit_files.PROXYD}"
    return Desired(
        accounts=accounts,
        daemon=PROXY_USER,
        directories=(*unit_files.fixed_directories(), *runtime),
        links=links,
        files=tuple(File(path=path, text=text) for path, text in files.items()),
        denied=tuple(account.name for account in system.accounts),
        firewall=filtered,
        units=(
            *_filter_units(filtered),
            Wanted(unit=f"{unit_files.PROXYD}.socket", restart_for=(f"{proxyd}.socket",)),
            Wanted(
                unit=f"{unit_files.PROXYD}.service",
                enabled=False,
                active=False,
                restart_for=(f"{proxyd}.service",),
                reload_for=(SYSTEM_FILE,),
                restart_why=renewed,
            ),
            Wanted(unit=f"{unit_files.HOSTD}.socket", restart_for=(f"{hostd}.socket",)),
            Wanted(unit=f"{unit_files.HOSTD}.service", enabled=False, active=False, restart_for=(f"{hostd}.service",)),
        ),
        stop=tuple(
            (unit, f"{account} is not granted any more") for unit, account in facts.runs if account not in granted
        ),
    )


def _filter_units(filtered: str | None) -> tuple[Wanted, ...]:
    if filtered is None:
        return ()
    paths = {unit: f"{unit_files.UNITS}/{unit}" for unit in (FIREWALL_UNIT, WATCHDOG_UNIT)}
    return tuple(Wanted(unit=unit, restart_for=(path,)) for unit, path in paths.items())


def _known(account: Account, facts: SystemFacts) -> bool:
    """Whether the host has it: one that is not granted any more stays, and is not made again."""
    return (account.name, account.uid) in facts.entries


def _credentials(policy: Policy, facts: SystemFacts) -> tuple[list[tuple[str, str]], str]:
    """Return what the system's broker gets by LoadCredential=, and why it must be restarted for it, if it must.

    A file of root's reaches it by systemd, which reads it when the broker starts. One that belongs to the broker's
    own user is read by itself at each use, so that a new key counts at once.
    """
    found: list[tuple[str, str]] = []
    renewed = ""
    for one in references(policy):
        scheme, _, target = one.text.partition(":")
        if scheme == "systemd":
            found.append((target, ""))
        if scheme != "file" or facts.keys[target].uid != 0:
            continue
        found.append((delivered_name(target), target))
        if 0 < facts.proxyd_since < facts.keys[target].changed:
            renewed = f"{target} is newer than it"
    return sorted(set(found)), renewed


def _problems(policy: Policy, facts: SystemFacts) -> list[Problem]:
    return [*_user_problems(policy, facts), *_key_problems(policy, facts)]


def _user_problems(policy: Policy, facts: SystemFacts) -> list[Problem]:
    agents = unit_agents(policy)
    problems = []
    if agents and not policy.users:
        first = next(iter(agents))
        remedy = f'[users.NAME] agents = ["{first}"], roots = ["~/src"]'
        problems.append(Problem("no user may start an agent: [users] must name at least one", ".users", remedy))
    for name in policy.users:
        where = f".users.{name}"
        if name not in facts.users:
            close = get_close_matches(name, [entry for entry, _ in facts.entries], n=1)
            remedy = f"did you mean {close[0]}?" if close else f"useradd {name}, or delete the table"
            problems.append(Problem(f"there is no user {name} on this host", where, remedy))
        elif name.startswith(ACCOUNT_PREFIX) or name == PROXY_USER:
            problems.append(Problem("an account of Cloister's own may start nothing", where, "delete the table"))
    for name in agents:
        if policy.users and not any(name in user.agents for user in policy.users.values()):
            remedy = f'agents = ["{name}"] in one of [users]'
            problems.append(Problem(f"nobody may start the agent {name}", f".agents.{name}", remedy))
    return problems


def _key_problems(policy: Policy, facts: SystemFacts) -> list[Problem]:
    problems = []
    for one in references(policy):
        scheme, _, path = one.text.partition(":")
        if scheme in {"login", "keyring", "pass", "env"}:
            message = f"the system's broker has no {_LACKS[scheme]}"
            problems.append(Problem(message, one.where, f'"file:{unit_files.KEYS}/NAME", mode 0600'))
        if scheme != "file":
            continue
        if not path.startswith("/"):
            problems.append(
                Problem("the system's broker has no home: name the whole path", one.where, f"file:{unit_files.KEYS}/…")
            )
        elif (key := facts.keys.get(path)) is None:
            remedy = f"(umask 077; cat > {path})    and paste it, then Enter and Ctrl-D"
            problems.append(Problem(f"there is no file {path}", one.where, remedy))
        elif key.mode & 0o077 or not key.safe:
            problems.append(
                Problem(f"others than its owner could read or change {path}", one.where, f"chmod 600 {path}")
            )
    return problems


_LACKS = {
    "login": "logins",
    "keyring": "desktop and no keyring",
    "pass": "password store",
    "env": "environment of its own",
}
