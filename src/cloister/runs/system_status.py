"""What `cloister status` shows: whether the installation stands as it was made, and what lives on it.

It looks and asks, and changes nothing; anybody may ask, and sees what the kernel and systemd tell them.
"""

from __future__ import annotations

import msgspec

from cloister.errors import CloisterError
from cloister.host.system_apply import Record
from cloister.host.system_probe import living_units, properties
from cloister.host.taps import read_network
from cloister.isolation import unit_files
from cloister.isolation.service_units import port_units, unit_name
from cloister.plan.bridge import UNIT as BRIDGE_UNIT
from cloister.plan.unit import SERVICE_PREFIX, SYSTEM_FILE, UNIT_PREFIX, Account, Grant, System
from cloister.runs import gateways, system_setup
from cloister.runs.service_files import active

DAEMONS = (
    f"{unit_files.HOSTD}.socket",
    f"{unit_files.HOSTD}.service",
    f"{unit_files.PROXYD}.socket",
    f"{unit_files.PROXYD}.service",
    f"{unit_files.AUDITD}.socket",
    f"{unit_files.AUDITD}.service",
    "cloister-firewall.service",
    "cloister-watchdog.service",
    BRIDGE_UNIT,
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
    port: int | None = None
    """Gateways: where the host's loopback has it."""
    port_held: bool | None = None
    """Gateways: whether systemd holds that port for it; another program may have it."""
    ready: str = ""
    """Gateways, where that was asked for: `yes`, or why not."""


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
    bridge: str = ""
    """Of microVMs: its network, and why it is another one than the policy's. Empty: there is none."""


def status(*, root: bool, ask: bool = False) -> Status:
    """Return how the installation stands.

    Args:
        root: whether we may read what only root can.
        ask: whether each gateway is asked for an answer through its model, which costs a call. For root.

    Raises:
        PolicyError: gateways were to be asked, and the policy, which has their tokens, is wrong.
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
        services=_with_ports(
            [lines[unit] for unit in living if unit.startswith(SERVICE_PREFIX) and lines[unit].state != "absent"],
            _asked() if ask else {},
        ),
        runs=tuple(lines[unit] for unit in living if unit.startswith(UNIT_PREFIX)),
        accounts=system.accounts,
        grants=system.grants,
        bridge=_bridge(system),
    )


def unit_lines(units: tuple[str, ...]) -> tuple[UnitLine, ...]:
    """Return the state of units, in this order."""
    found = properties(units, _NAMES)
    return tuple(_line(unit, found.get(unit, {})) for unit in units)


def _with_ports(lines: list[UnitLine], ready: dict[str, str]) -> tuple[UnitLine, ...]:
    """Add to gateways where they listen, as systemd holds it for them, and what they answered."""
    sockets = {
        line.unit: port_units(line.unit.removeprefix(SERVICE_PREFIX).removesuffix(".service"))[0] for line in lines
    }
    found = properties(tuple(sockets.values()), ("Listen", "ActiveState"))
    made = []
    for line in lines:
        socket = found.get(sockets[line.unit], {})
        made.append(
            msgspec.structs.replace(
                line,
                port=_port(socket.get("Listen", "")),
                port_held=socket.get("ActiveState") == "active",
                ready=ready.get(line.unit, ""),
            )
        )
    return tuple(made)


def _port(listen: str) -> int | None:
    """Return the port of a `Listen` property, such as `127.0.0.1:18789 (Stream)`."""
    port = listen.partition(" ")[0].rpartition(":")[2]
    return int(port) if port.isdecimal() else None


def _asked() -> dict[str, str]:
    """Ask every gateway of the policy for an answer through its model; return `yes`, or why not, by unit."""
    found = system_setup.read_policy()
    answers = {
        unit_name(one.joined): gateways.readiness(one, found.system.policy, gateways.ANSWER_S)
        for one in active(found.document)
    }
    return {unit: why or "yes" for unit, why in answers.items()}


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


def _bridge(system: System) -> str:
    if system.bridge is None:
        return ""
    try:
        return read_network().describe()
    except CloisterError as error:
        return error.message


def _system() -> System:
    try:
        with open(SYSTEM_FILE, "rb") as file:
            return msgspec.json.decode(file.read(), type=System)
    except (OSError, msgspec.DecodeError):
        return System()
