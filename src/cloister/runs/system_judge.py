"""Whether a system's installation may be made at all: the host, the installed program, the policy's users and keys.

Pure: policy and facts come in, refusals go out, all mistakes of the policy at once. What is made of a good policy is
`system_compile`.
"""

from __future__ import annotations

from difflib import get_close_matches

import msgspec

from cloister.errors import Problem, UnsupportedError
from cloister.identity.accounts import Owner
from cloister.isolation import unit_files
from cloister.plan.system_facts import SystemFacts
from cloister.plan.unit import ACCOUNT_PREFIX, DAEMON_USERS
from cloister.policy.model import Agent, Policy
from cloister.runs import remedies
from cloister.runs.doctor import OLDEST_SYSTEMD


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
    served: tuple[Owner, ...] = ()
    """Gateways, each of which needs an account."""
    channels: tuple[Reference, ...] = ()
    """Secrets of their channels."""


def refuse_host(facts: SystemFacts) -> None:
    """Refuse a host on which nothing can be installed.

    Raises:
        UnsupportedError: `no-systemd`, `systemd-too-old`, `installation-changeable`, `no-helper`, `no-sysusers`.
    """
    if not facts.systemd_booted:
        message = f"the service manager is {facts.pid1 or 'unknown'}, not systemd: there are no units here"
        remedy = 'isolation = "namespace" needs none of this'
        raise UnsupportedError("no-systemd", message, remedy=remedy)
    if (facts.systemd_version,) < OLDEST_SYSTEMD:
        message = f"systemd {facts.systemd_version} is older than {OLDEST_SYSTEMD[0]}"
        raise UnsupportedError("systemd-too-old", message, remedy=remedies.NEW_SYSTEMD)
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
        message = "systemd-sysusers, which makes the agents' accounts, is not installed"
        raise UnsupportedError("no-sysusers", message, remedy="apt install systemd, or systemd-standalone-sysusers")


def unit_agents(policy: Policy) -> dict[str, Agent]:
    """Return the agents that run as system users."""
    return {name: agent for name, agent in policy.agents.items() if agent.isolation == "unit"}


def references(source: SystemPolicy) -> tuple[Reference, ...]:
    """Return every secret that the system's broker needs for agents of its own, and for gateways."""
    policy = source.policy
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
    return tuple(one for one in (*found, *source.channels) if one.text)


def key_paths(source: SystemPolicy) -> tuple[str, ...]:
    """Return the files among them."""
    targets = (one.text.partition(":") for one in references(source))
    return tuple(dict.fromkeys(path for scheme, _, path in targets if scheme == "file"))


def problems(source: SystemPolicy, facts: SystemFacts) -> list[Problem]:
    """Return every mistake of a policy that shows on this host only."""
    return [*_user_problems(source, facts), *_key_problems(source, facts), *_export_problems(source)]


def _export_problems(source: SystemPolicy) -> list[Problem]:
    """Files for receivers of the audit are read by systemd, which knows no home."""
    audit = source.policy.audit
    return [
        Problem("name the whole path: there is no home here", f".audit.{key}", f'{key} = "{unit_files.KEYS}/…"')
        for key, path in (("ca", audit.ca), ("certificate", audit.certificate))
        if path and not path.startswith("/")
    ]


def _user_problems(source: SystemPolicy, facts: SystemFacts) -> list[Problem]:
    policy = source.policy
    served = {owner.agent for owner in source.served}
    agents = [name for name in unit_agents(policy) if name not in served]
    problems = []
    if agents and not policy.users:
        first = agents[0]
        remedy = f'[users.NAME] agents = ["{first}"], roots = ["~/src"]'
        problems.append(Problem("no user may start an agent: [users] must name at least one", ".users", remedy))
    for name in policy.users:
        where = f".users.{name}"
        if name not in facts.users:
            close = get_close_matches(name, [entry for entry, _ in facts.entries], n=1)
            remedy = f"did you mean {close[0]}?" if close else f"useradd {name}, or delete the table"
            problems.append(Problem(f"there is no user {name} on this host", where, remedy))
        elif name.startswith(ACCOUNT_PREFIX) or name in DAEMON_USERS:
            problems.append(Problem("an account of Cloister's own may start nothing", where, "delete the table"))
    problems += [
        Problem(f"there is no user {name} on this host", ".microvm.users", f"useradd {name}")
        for name in policy.microvm.users
        if name not in facts.users
    ]
    for name in agents:
        if policy.users and not any(name in user.agents for user in policy.users.values()):
            remedy = f'agents = ["{name}"] in one of [users]'
            problems.append(Problem(f"nobody may start the agent {name}", f".agents.{name}", remedy))
    return problems


def _key_problems(source: SystemPolicy, facts: SystemFacts) -> list[Problem]:
    problems = []
    for one in references(source):
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
