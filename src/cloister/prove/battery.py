"""A whole battery for one agent: place, canaries, opt-outs and facts put together. What `cloister prove` calls."""

from __future__ import annotations

import contextlib
import os
import pwd
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from cloister.errors import UnsupportedError, UsageError
from cloister.host.addresses import own_addresses
from cloister.policy.model import Agent
from cloister.policy.protected import effective_names
from cloister.policy.units import parse_size
from cloister.prove import policy_facts, units
from cloister.prove.canaries import Canaries
from cloister.prove.case import Case, load
from cloister.prove.known_secrets import read
from cloister.prove.place import Place
from cloister.prove.policy_facts import held, opened
from cloister.prove.runner import Battery, Result, python_missing
from cloister.prove.session import PYTHON, SessionError

_GUESTS_PATIENCE = 4.0


def select(names: tuple[str, ...]) -> list[Case]:
    """Return the cases of these ids, or all.

    Raises:
        UsageError: there is no such case.
    """
    cases = load()
    for name in names:
        if name not in cases:
            import difflib

            close = difflib.get_close_matches(name, cases, n=1)
            hint = f"cloister prove --case {close[0]}" if close else "cloister prove --list"
            raise UsageError("case-unknown", f"no case {name!r}", remedy=hint)
    return [case for case in cases.values() if not names or case.id in names]


def prove(  # noqa: PLR0913  # the command line, as values
    agent: str, cases: list[Case], environ: Mapping[str, str], *, profile: str = "", here: str = "",
    on_result: Callable[[Result], None] = lambda _: None,
) -> list[Result]:  # fmt: skip
    """Attack the sandbox of `agent` with `cases`; return what came of each.

    Raises:
        CloisterError: the policy is wrong, or nothing can be run here.
    """
    if python_missing():
        raise UnsupportedError("python-missing", f"the cases run with {PYTHON}, which is not there",
                               remedy="apt-get install python3-minimal")  # fmt: skip
    with contextlib.ExitStack() as stack:
        place = Place(environ, agent, profile)
        stack.enter_context(place)
        watched = (place.user_paths.policy,)
        canaries = stack.enter_context(Canaries(place.base, place.owner.home, watched, place.runtime))
        lifting = lifted(place.resolved.agent) | {word for word, opens in opened(place.resolved).items() if opens}
        battery = Battery(place, canaries, lifting, facts(place), on_result, here, held(place.resolved))
        _preflight(battery)
        if place.unit:
            units.refuse_another(place.base)
        if battery.held:
            from cloister.host.secrets_memory import forbid_looking  # it loads the C library, as in policy_facts

            forbid_looking()
            canaries.known = read(place)
        battery.facts["unread_secrets"] = canaries.known.unread
        return battery.run(for_guests(cases) if battery.facts["guest"] else cases)


def for_guests(cases: list[Case]) -> list[Case]:
    """Return the cases as they are tried in a virtual machine.

    A guest works in a copy that is handed back when it has ended, so consequences show after each run only. Where it is
    emulated everything takes several times as long.
    """
    return [
        msgspec.structs.replace(case, fresh=case.fresh or bool(case.checks), limit_s=case.limit_s * _GUESTS_PATIENCE)
        for case in cases
    ]


def _preflight(battery: Battery) -> None:
    """Start one run and end it: where none starts, that is one error, not one per case.

    Raises:
        UnsupportedError: it did not start; says what the run said.
    """
    try:
        with battery.session(battery.workspace("clone")):
            pass
    except SessionError as error:
        lines = [line.strip().removeprefix("cloister: ").removeprefix("where: ") for line in str(error).splitlines()]
        first, *rest = lines or ["no reason given"]
        raise UnsupportedError(
            "sandbox-not-started",
            f"the sandbox does not start: {first}",
            where="; ".join(rest),
            remedy="cloister doctor",
        ) from error


def lifted(agent: Agent) -> frozenset[str]:
    """Return the words of everything that the policy allows on purpose, as cases name them in LIFTED_BY."""
    nested = agent.hardening.nested or agent.agent_sandbox.managed
    words = {
        "hardening.nested": nested,
        "hardening.ptrace": agent.hardening.ptrace,
        "hardening.netlink": agent.hardening.netlink,
        "egress.mode = learn": agent.egress.mode == "learn",
        "egress.mode = internet": agent.egress.mode == "internet",
        "egress.private": bool(agent.egress.private),
        "workspace.unprotected": bool(agent.workspace.unprotected),
        "workspace.mode = overlay": agent.workspace.mode == "overlay",
        "limits.tasks_max is not set": agent.limits.tasks_max is None,
        "limits.memory_max is not set": not agent.limits.memory_max,
        "limits.disk_max is not set": not agent.limits.disk_max,
    }
    return frozenset(word for word, holds in words.items() if holds)


def facts(place: Place) -> dict[str, Any]:
    """Return what cases may know about the host: names and numbers an attacker could guess, no secret."""
    names = effective_names((), ())
    agent = place.resolved.agent
    paths, own = place.user_paths, place.paths
    return {
        "protected": [[entry.name, entry.kind] for entry in names if entry.when == "always"],
        "protected_present": [[entry.name, entry.kind] for entry in names],
        "host_addresses": [text for text in own_addresses() if not text.startswith("127.") and text != "::1"],
        "host_homes": sorted({entry.pw_dir for entry in pwd.getpwall() if _is_home(entry.pw_dir, place.owner.home)}),
        "host_sockets": _host_sockets(),
        "host_path": [part for part in os.environ.get("PATH", "").split(":") if part.startswith("/")],
        "base": place.base,
        "pass_environment": [*agent.pass_environment, *place.resolved.preset.pass_environment],
        "policy": paths.policy,
        "cloister_paths": [paths.config, paths.state, paths.runtime, own.state, own.runtime],
        "broker_socket": own.broker_socket,
        "allowed_hosts": [str(rule) for rule in agent.egress.allow if isinstance(rule, str)],
        "tasks_max": agent.limits.tasks_max or 0,
        "ptrace": agent.hardening.ptrace,
        "memory_bytes": parse_size(agent.limits.memory_max) if agent.limits.memory_max else 0,
        "disk_bytes": parse_size(agent.limits.disk_max) if agent.limits.disk_max else 0,
        "overlay": agent.workspace.mode == "overlay",
        "egress_mode": agent.egress.mode,
        "host_name": os.uname().nodename,
        "host_machine_id": _machine_id(),
        "nested": "hardening.nested" in lifted(agent),
        "guest": agent.isolation == "microvm",
        **units.facts(place.resolved, place.owner.uid),
        **policy_facts.facts(place.resolved, paths, own),
    }


def _is_home(path: str, own: str) -> bool:
    return (
        path.startswith("/")
        and path != own
        and not own.startswith(path.rstrip("/") + "/")
        and os.path.isdir(path)
        and (path.startswith(("/home/", "/root", "/var/lib/", "/var/spool/")))
    )


def _machine_id() -> str:
    try:
        with open("/etc/machine-id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def _host_sockets() -> list[str]:
    """Return the names of all Unix sockets somebody on the host listens on, abstract ones with `@` (proc_net(5))."""
    found: dict[str, None] = {}
    with contextlib.suppress(OSError), open("/proc/net/unix", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            words = line.rstrip("\n").split(" ", 7)
            fields = line.split()
            if len(fields) >= 8 and fields[3] == "00010000" and words:  # noqa: PLR2004  # __SO_ACCEPTCON
                found[fields[7]] = None
    return [name for name in found if name.isprintable()][:300]


def refuse_here(directory: str) -> str:
    """Return the directory for --here.

    Raises:
        UsageError: it is none.
    """
    if not os.path.isdir(directory):
        raise UsageError("directory-unusable", "the directory is not there", where=directory)
    return os.path.realpath(directory)


def promises() -> dict[str, str]:
    """Return the words of the promises that cases prove, by number."""
    import tomllib
    from importlib import resources

    text = resources.files("cloister.prove").joinpath("promises.toml").read_text("utf-8")
    table: dict[str, str] = tomllib.loads(text)["promises"]
    return table
