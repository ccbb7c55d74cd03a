"""Gateways as a part of the system's installation: what is known about the host for them, and their files as wanted.

What stands in those files is `service_files`; when they are put in place is for `system_setup`. Looks at programs and
directories that the policy names, and starts nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

from cloister.errors import CloisterError
from cloister.host import ports
from cloister.host.agent_program import find_program
from cloister.host.service_sources import read_tree
from cloister.host.system_probe import properties
from cloister.identity.accounts import Owner
from cloister.isolation import service_units
from cloister.isolation.environment import PATH
from cloister.plan.service_facts import ProgramFacts, ServiceFacts, ServiceUnits, SourceFile
from cloister.plan.system_diff import Directory, File, Wanted
from cloister.plan.system_facts import SystemFacts
from cloister.plan.unit import AGENTS, Account
from cloister.policy.document import Document, show_path
from cloister.policy.merge import resolve
from cloister.policy.model import Policy, Preset
from cloister.runs.channel_secrets import swapped
from cloister.runs.service_files import active, wanted_sources, wanted_tools
from cloister.runs.system_judge import Reference

_SHELLS = ("/bin/bash", "/bin/sh")
_TOOL = re.compile(r"[A-Za-z0-9@_.+-]+")


def owners(document: Document) -> tuple[Owner, ...]:
    """Return who needs an account: each enabled gateway."""
    return tuple(Owner(gateway.settings.agent, service=gateway.joined) for gateway in active(document))


def secrets(document: Document) -> tuple[Reference, ...]:
    """Return those of channels that the system's broker puts into requests, and so has to have."""
    return tuple(
        Reference(show_path((*gateway.path, name)), one.secret)
        for gateway in active(document)
        for name, one in swapped(gateway.settings).items()
    )


def take_service_facts(
    document: Document, policy: Policy, presets: Mapping[str, Preset], facts: SystemFacts
) -> ServiceFacts:
    """Return what the units of gateways depend on; what could not be read or found is left out or says why."""
    sources: dict[str, dict[str, SourceFile]] = {}
    unreadable: dict[str, str] = {}
    for path in wanted_sources(document):
        try:
            sources[path] = read_tree(path)
        except OSError as error:
            unreadable[path] = error.strerror or str(error)
        except ValueError as error:
            unreadable[path] = str(error)
    tools = frozenset(name for name in wanted_tools(document) if _installed(name))
    return ServiceFacts(
        systemd=facts.systemd_version,
        machine=os.uname().machine,
        shim=facts.shim,
        merged_usr="bin" in facts.root_links,
        links={name: target.lstrip("/") for name, target in facts.root_links.items()},
        shell=next((shell for shell in _SHELLS if os.access(shell, os.X_OK)), _SHELLS[-1]),
        hostname=os.uname().nodename,
        programs=_programs(document, policy, presets),
        sources=sources,
        unreadable=unreadable,
        taken=_taken(document),
        tools=tools,
    )


def files_of(made: Iterable[ServiceUnits], accounts: Mapping[str, Account]) -> tuple[File, ...]:
    """Return the files of gateways; an account's group may read what is meant for it."""
    return tuple(
        File(path=file.path, text=file.text, mode=file.mode, gid=accounts[units.joined].uid if file.account else 0)
        for units in made
        for file in units.files
    )


def directories_of(made: Iterable[ServiceUnits]) -> tuple[Directory, ...]:
    """Return the directories of gateways that are root's."""
    paths = dict.fromkeys(path for units in made for path in units.directories)
    return tuple(Directory(path=path) for path in paths)


def units_of(made: Iterable[ServiceUnits]) -> tuple[Wanted, ...]:
    """Return how the units of gateways shall be."""
    wanted: list[Wanted] = []
    for units in made:
        gateway = service_units.unit_name(units.joined)
        wanted += [Wanted(unit=one, enabled=False, active=False, restart_for=_own(one)) for one in units.passive]
        wanted += [
            Wanted(unit=one, restart_for=units.restart_for if one == gateway else _own(one)) for one in units.enabled
        ]
    return tuple(wanted)


def _taken(document: Document) -> frozenset[int]:
    """Return the ports that somebody else has: systemd holds a gateway's for it from the first `apply` on."""
    sockets = {service_units.port_units(one.joined)[0]: one.settings.port for one in active(document)}
    shown = properties(tuple(sockets), ("ActiveState", "Listen"))
    ours = {
        port
        for unit, port in sockets.items()
        if shown.get(unit, {}).get("ActiveState") == "active" and f":{port} " in shown[unit].get("Listen", "")
    }
    return frozenset(port for port in sockets.values() if port not in ours and ports.taken(port))


def _own(unit: str) -> tuple[str, ...]:
    return (f"/etc/systemd/system/{unit}",)


def _installed(name: str) -> bool:
    return bool(_TOOL.fullmatch(name)) and any(os.access(f"{place}/{name}", os.X_OK) for place in ("/usr/bin", "/bin"))


def _programs(document: Document, policy: Policy, presets: Mapping[str, Preset]) -> dict[str, ProgramFacts]:
    """Find the programs in root's own places: an administrator's PATH may lead to what others can change."""
    found = {}
    for name in dict.fromkeys(gateway.settings.agent for gateway in active(document)):
        command = resolve(document, name, presets=presets, policy=policy).agent.command
        try:
            program = find_program(command[0] if command else "", PATH, home="/root", forbidden=(AGENTS,))
        except CloisterError:
            continue  # `service_files` says so
        found[name] = ProgramFacts(path=program.path, binds=program.binds, names=program.names)
    return found
