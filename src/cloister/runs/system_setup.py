"""Installing, changing and removing Cloister as a part of a system: a plan that is shown first, and then done.

What `cloister setup`, `apply`, `uninstall` and `status` share. Deciding is `system_compile` and `plan/system_diff`;
doing is `host/system_apply`. Nothing here asks or prints.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from cloister.errors import DeniedError, PolicyError, Problem, StepError
from cloister.host.system_apply import RECORD, Applier, Record, read_record
from cloister.host.system_probe import changeable, living_units, look, take_facts
from cloister.isolation import unit_files
from cloister.plan.service_facts import ServiceUnits
from cloister.plan.system import InstallFile, MakeDirectory, RemoveAccounts, RemoveTree, SystemPlan
from cloister.plan.system_diff import Desired, Found, Made, difference, made
from cloister.plan.system_facts import SystemFacts
from cloister.plan.unit import (
    AGENTS,
    AUDIT_LOG,
    AUDIT_USER,
    ETC,
    EXPORT_STATE,
    EXPORT_USER,
    PROXY_STATE,
    PROXY_USER,
    RUNTIME,
    STATE,
    SYSTEM_FILE,
    Account,
    System,
)
from cloister.policy.document import Document, read
from cloister.policy.load import load_document
from cloister.policy.merge import resolve
from cloister.policy.model import Preset
from cloister.policy.presets import all_presets
from cloister.runs import policies, system_services
from cloister.runs.paths import SYSTEM_POLICY
from cloister.runs.service_files import render_service_units
from cloister.runs.system_compile import compile_system, give_accounts
from cloister.runs.system_judge import SystemPolicy, key_paths, refuse_host, unit_agents

PRESETS = f"{ETC}/presets"
HOSTD_STATE = f"{STATE}/hostd"
"""What hostd undoes living units from; with those ended it says nothing."""

STARTER = """\
# What agents may do on this machine, and who may start them. Manual: cloister.toml(5).
# After a change: sudo cloister apply (shows what it will do, and asks).
schema = 1

# [providers.anthropic]
# key = "file:/etc/cloister/keys/anthropic.key"    # (umask 077; cat > /etc/cloister/keys/anthropic.key)
#
# [agents.claude]
# preset = "claude"
# isolation = "unit"             # a system user of its own for each person who starts it
#
# [agents.claude.llm]
# providers = ["anthropic"]
# cost_per_day_usd = 20.0
#
# [users.alice]
# agents = ["claude"]
# roots = ["~/src"]
"""
"""The first policy of a system: nothing may run until somebody says what."""


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """What will be done, and what will be written down about it."""

    plan: SystemPlan
    record: Record
    after: Record | None
    """None: nothing of the installation will be left, not even the record."""


def require_root(verb: str, uid: int) -> None:
    """Refuse ordinary users, with what to type.

    Raises:
        DeniedError: `not-root`.
    """
    if uid != 0:
        message = f"cloister {verb} changes the system, and you are not root"
        raise DeniedError("not-root", message, remedy=f"sudo cloister {verb}")


@dataclass(frozen=True, slots=True)
class Read:
    """The system's policy, as values and as it was written."""

    system: SystemPolicy
    document: Document
    presets: Mapping[str, Preset]


def read_policy() -> Read:
    """Return the system's policy.

    Raises:
        PolicyError: it is wrong, missing (`policy-missing`), or others could change it (`policy-untrusted`).
    """
    _refuse_changeable(SYSTEM_POLICY)
    source = policies.read_trusted(SYSTEM_POLICY, 0)
    if source is None:
        problem = Problem("the system has no policy yet", SYSTEM_POLICY, "sudo cloister setup")
        raise PolicyError([problem], reference="policy-missing")
    sources = _preset_sources()
    return _understand(source, sources)


def prepare_setup() -> Prepared:
    """Return what a first installation does: a starter policy where there is none, and the rest.

    Raises:
        CloisterError: as `prepare_apply`.
    """
    if os.path.lexists(SYSTEM_POLICY):
        return prepare_apply()
    source = policies.Source(SYSTEM_POLICY, STARTER.encode())
    prepared = _prepare(_understand(source, _preset_sources()))
    steps = list(prepared.plan.steps)
    after = max((place for place, step in enumerate(steps, 1) if isinstance(step, MakeDirectory)), default=0)
    steps.insert(after, InstallFile(path=SYSTEM_POLICY, text=STARTER))
    plan = msgspec.structs.replace(prepared.plan, steps=tuple(steps))
    return msgspec.structs.replace(prepared, plan=plan)


def prepare_apply() -> Prepared:
    """Return what must change for the system to be as its policy says.

    Raises:
        PolicyError: the policy is wrong; nothing changes.
        UnsupportedError: this host cannot have it.
        StepError: something that is not ours stands in the way.
    """
    return _prepare(read_policy())


def prepare_uninstall(*, purge: bool) -> Prepared:
    """Return what removes everything that was made; data and the accounts that own it only with `purge`.

    Raises:
        UnsupportedError: systemd does not run here.
        StepError: `not-installed`, or the record cannot be read.
    """
    record = _recorded()
    facts = take_facts()
    refuse_host(msgspec.structs.replace(facts, changeable="", shim="unneeded"))
    if record == Record():
        raise StepError("not-installed", "Cloister is not installed in this system", where=RECORD)
    stop = tuple((unit, "Cloister is uninstalled") for unit in living_units() if unit not in record.made.units)
    desired = Desired(stop=stop)
    found = look(desired, record.made)
    plan = difference(desired, found, record.made, record.unfinished)
    keeping, going = _divide(record.accounts, purge=purge)
    daemons = tuple(
        name for name, kept in ((PROXY_USER, PROXY_STATE), (AUDIT_USER, AUDIT_LOG), (EXPORT_USER, EXPORT_STATE))
        if name in found.names and (purge or not _holds(kept))
    )  # fmt: skip
    there = tuple(account for account in going if account.name in found.names)
    steps = list(plan.steps)
    if there or daemons:
        steps.append(RemoveAccounts(accounts=there, daemons=daemons))
    steps += [RemoveTree(path=path) for path in (RUNTIME, HOSTD_STATE) if os.path.isdir(path)]
    if purge:
        steps += [RemoveTree(path=path) for path in (STATE, ETC, os.path.dirname(AUDIT_LOG)) if os.path.isdir(path)]
    notices = () if purge else _kept(keeping)
    left = None if purge or not notices else Record(accounts=keeping, made=_still(found, record))
    return Prepared(plan=SystemPlan(steps=tuple(steps), notices=notices), record=record, after=left)


def carry_out(prepared: Prepared, applier: Applier | None = None) -> None:
    """Do what was prepared.

    Raises:
        StepError: a step failed, and everything was undone.
        RetryError: another process is at work.
    """
    applier = applier or Applier()
    with applier.locked():
        if _recorded() != prepared.record:
            message = "another setup, apply or uninstall came in between"
            raise StepError("plan-outdated", message, remedy="run it again")
        applier.apply(prepared.plan, prepared.record, prepared.after)


def _understand(source: policies.Source, others: list[policies.Source]) -> Read:
    presets = _presets(others)
    document = read(source.text, source.path)
    policy = load_document(document, preset_names=tuple(presets))
    agents = {name: resolve(document, name, presets=presets, policy=policy).agent for name in unit_agents(policy)}
    total = policies.digest([source, *others])
    system = SystemPolicy(
        policy=policy,
        agents=agents,
        digest=total,
        served=system_services.owners(document),
        channels=system_services.secrets(document),
    )
    return Read(system=system, document=document, presets=presets)


def _prepare(found: Read) -> Prepared:
    source, policy = found.system, found.system.policy
    record = _recorded()
    facts = take_facts({*policy.users, *policy.microvm.users}, key_paths(source), f"{unit_files.PROXYD}.service")
    accounts = give_accounts(source, facts, record.accounts)
    desired = compile_system(source, facts, accounts, _services(found, accounts, facts))
    there = look(desired, record.made)
    plan = difference(desired, there, record.made, record.unfinished)
    after = Record(made=made(desired, there, record.made), accounts=accounts)
    return Prepared(plan=plan, record=record, after=after)


def _services(found: Read, accounts: tuple[Account, ...], facts: SystemFacts) -> tuple[ServiceUnits, ...]:
    policy, document = found.system.policy, found.document
    if not found.system.served:
        return ()
    known = system_services.take_service_facts(document, policy, found.presets, facts)
    served = {account.service: account for account in accounts if account.service}
    return render_service_units(document, policy, found.presets, served, known)


def _recorded() -> Record:
    """Return the record; where it is lost, the accounts that `cloister-hostd` knows are better than none."""
    record = read_record()
    if record != Record():
        return record
    try:
        with open(SYSTEM_FILE, "rb") as file:
            return Record(accounts=msgspec.json.decode(file.read(), type=System).accounts)
    except (OSError, msgspec.DecodeError):
        return record


def _divide(accounts: tuple[Account, ...], *, purge: bool) -> tuple[tuple[Account, ...], tuple[Account, ...]]:
    """Return accounts that keep files, and those that may go."""
    keeping = tuple(one for one in accounts if not purge and any(_holds(f"{base}/{one.name}") for base in _LEAVES))
    return keeping, tuple(one for one in accounts if one not in keeping)


_LEAVES = (AGENTS, unit_files.SERVICES)


def _holds(path: str) -> bool:
    """Whether there is anything in a directory."""
    try:
        with os.scandir(path) as entries:
            return next(entries, None) is not None
    except OSError:
        return False


def _kept(accounts: tuple[Account, ...]) -> tuple[str, ...]:
    """Say what stays."""
    names = ", ".join(account.name for account in accounts)
    notices = [f"{STATE}/agents and {STATE}/services keep the files of {names}"] if names else []
    notices += [f"{PROXY_STATE} keeps the records and books of the system's broker"] if _holds(PROXY_STATE) else []
    notices += [f"{AUDIT_LOG} keeps what agents did, on record"] if _holds(AUDIT_LOG) else []
    notices += [f"{ETC} keeps your policy and keys"] if _holds(ETC) else []
    return (*notices, "cloister uninstall --purge deletes them") if notices else ()


def _still(found: Found, record: Record) -> Made:
    """Return which directories stay ours: those that something is kept in."""
    return Made(
        directories=tuple(path for path in record.made.directories if path in found.directories and _holds(path))
    )


def _refuse_changeable(path: str) -> None:
    """Refuse a policy in a place that others could change: it says what root's daemon does."""
    real = os.path.realpath(path)
    if os.path.lexists(path) and (place := changeable((path, real))):
        remedy = f"chown root {place}; chmod go-w {place}"
        problem = Problem("others than root could change it", place, remedy)
        raise PolicyError([problem], reference="policy-untrusted")


def _preset_sources() -> list[policies.Source]:
    try:
        names = sorted(name for name in os.listdir(PRESETS) if name.endswith(".toml"))
    except OSError:
        return []
    sources = []
    for name in names:
        _refuse_changeable(f"{PRESETS}/{name}")
        if source := policies.read_trusted(f"{PRESETS}/{name}", 0):
            sources.append(source)
    return sources


def _presets(sources: list[policies.Source]) -> Mapping[str, Preset]:
    return all_presets({os.path.basename(one.path).removesuffix(".toml"): one.text for one in sources})
