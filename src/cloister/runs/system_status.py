"""What `cloister status` shows: whether the installation stands as it was made, and what lives on it.

It looks and asks, and changes nothing; anybody may ask, and sees what the kernel and systemd tell them.
"""

from __future__ import annotations

import msgspec

from cloister.errors import CloisterError
from cloister.host.system_apply import Record
from cloister.host.system_probe import living_units, properties
from cloister.isolation import unit_files
from cloister.plan.unit import SERVICE_PREFIX, SYSTEM_FILE, UNIT_PREFIX, Account, Grant, System
from cloister.runs import system_setup

DAEMONS = (
    f"{unit_files.HOSTD}.socket",
    f"{unit_files.HOSTD}.service",
    f"{unit_files.PROXYD}.socket",
    f"{unit_files.PROXYD}.service",
    "cloister-firewall.service",
    "cloister-watchdog.service",
)
_NAMES = ("LoadState", "ActiveState", "SubState", "UnitFileState", "User", "ActiveEnterTimestamp", "MemoryCurrent")


class UnitLine(msgspec.Struct, frozen=True, kw_only=True):
    """One unit, as systemd sees it."""

    unit: str
    state: str
    """`active`, `inactive`, `failed`, or `absent`."""
    detail: str = ""
    since: str = ""
    account: str = ""
    memory_bytes: int | None = None


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer."""

    installed: bool
    as_declared: bool | None
    """Whether `cloister apply` would find nothing to do; None where only root can know."""
    trouble: str = ""
    """Why that could not be found out."""
    daemons: tuple[UnitLine, ...] = ()
    services: tuple[UnitLine, ...] = ()
    runs: tuple[UnitLine, ...] = ()
    accounts: tuple[Account, ...] = ()
    grants: tuple[Grant, ...] = ()


def status(*, root: bool) -> Status:
    """Return how the installation stands.

    Args:
        root: whether we may read what only root can.
    """
    system = _system()
    declared = (f"{SERVICE_PREFIX}{account.service}.service" for account in system.accounts if account.service)
    living = tuple(dict.fromkeys((*declared, *living_units())))
    lines = {line.unit: line for line in unit_lines((*DAEMONS, *living))}
    as_declared, trouble = _as_declared() if root else (None, "")
    return Status(
        installed=lines[DAEMONS[0]].state != "absent",
        as_declared=as_declared,
        trouble=trouble,
        daemons=tuple(lines[unit] for unit in DAEMONS if unit in lines),
        services=tuple(
            lines[unit] for unit in living if unit.startswith(SERVICE_PREFIX) and lines[unit].state != "absent"
        ),
        runs=tuple(lines[unit] for unit in living if unit.startswith(UNIT_PREFIX)),
        accounts=system.accounts,
        grants=system.grants,
    )


def unit_lines(units: tuple[str, ...]) -> tuple[UnitLine, ...]:
    """Return the state of units, in this order."""
    found = properties(units, _NAMES)
    return tuple(_line(unit, found.get(unit, {})) for unit in units)


def _line(unit: str, values: dict[str, str]) -> UnitLine:
    loaded = values.get("LoadState", "not-found") not in {"not-found", ""}
    memory = values.get("MemoryCurrent", "")
    return UnitLine(
        unit=unit,
        state=values.get("ActiveState", "inactive") if loaded else "absent",
        detail=values.get("SubState", "") if loaded else "",
        since=values.get("ActiveEnterTimestamp", ""),
        account=values.get("User", ""),
        memory_bytes=int(memory) if memory.isdecimal() and len(memory) < 19 else None,  # noqa: PLR2004  # else "not set"
    )


def _as_declared() -> tuple[bool | None, str]:
    try:
        prepared = system_setup.prepare_apply()
    except CloisterError as error:
        return None, error.message
    return not prepared.plan.steps and prepared.record != Record(), ""


def _system() -> System:
    try:
        with open(SYSTEM_FILE, "rb") as file:
            return msgspec.json.decode(file.read(), type=System)
    except (OSError, msgspec.DecodeError):
        return System()
