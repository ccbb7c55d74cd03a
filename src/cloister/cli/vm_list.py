"""`cloister vm list`, `stats` and `balloon`: which machines live, what they take, and how much memory they may keep."""

from __future__ import annotations

import argparse
import contextlib
import time

import msgspec

from cloister.cli import output, records, vm
from cloister.cli.arguments import Parser
from cloister.cli.vm_start import mebibytes
from cloister.errors import CloisterError, UsageError
from cloister.plan.vm import VmLaunch
from cloister.policy.units import parse_size
from cloister.runs import vm_control
from cloister.runs.listing import Row

_MIB = 1 << 20


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    """One machine as it is listed. Times are seconds."""

    name: str
    id: str
    image: str
    status: str
    pid: int
    """Of the monitor; 0 when it does not live."""
    memory_mib: int
    cpus: int
    uptime: float
    warm: bool
    """Whether it started from a template."""
    monitor: str
    accelerator: str
    address: str
    """On the bridge; empty without."""
    ports: tuple[int, ...]
    workspace: str
    exit_code: int | None
    reason: str


def describe(actions: argparse._SubParsersAction[Parser]) -> None:
    """Add the actions."""
    shown = actions.add_parser("list", help="list machines")
    shown.add_argument("-a", "--all", action="store_true", help="those of finished runs too")
    shown.add_argument("-q", "--quiet", action="store_true", help="print only ids")
    shown.add_argument("--json", action="store_true", help=f"print JSON with the keys {_keys(Listed)}")
    stats = actions.add_parser("stats", help="show what machines take of the host")
    stats.add_argument("machine", metavar="MACHINE", nargs="*", help="runs or agents; all living ones when none")
    stats.add_argument(
        "--json", action="store_true", help=f"print JSON with the keys run, {_keys(vm_control.Usage)}, guest"
    )
    balloon = actions.add_parser("balloon", help="say how much of its memory a guest may use")
    balloon.add_argument("machine", metavar="MACHINE", help="a run or an agent")
    balloon.add_argument("size", metavar="SIZE", help="such as 256M; a number alone counts MiB")
    balloon.add_argument("--json", action="store_true", help="print JSON with the keys run, balloon_mib")


def main(options: argparse.Namespace) -> int:
    """Do one of the actions.

    Raises:
        CloisterError: no such machine, or its monitor refuses.
    """
    match options.action:
        case "list":
            _list(options)
        case "stats":
            _stats(options)
        case _:
            _balloon(options)
    return 0


def listed(row: Row, machine: VmLaunch, now: float) -> Listed:
    """Return one machine as it is listed."""
    return Listed(
        name=row.agent,
        id=row.id,
        image=f"{machine.image} {machine.version}",
        status=row.status,
        pid=vm_control.monitor_pid(machine) if row.status in ("running", "starting") else 0,
        memory_mib=machine.memory_mib,
        cpus=machine.cpus,
        uptime=round((row.finished or now) - row.started, 3),
        warm=bool(machine.template),
        monitor=machine.monitor,
        accelerator=machine.accelerator,
        address=next((word.partition("=")[2] for word in machine.fields if word.startswith("address=")), ""),
        ports=machine.ports,
        workspace=row.workspace,
        exit_code=row.exit_code,
        reason=row.reason,
    )


def _list(options: argparse.Namespace) -> None:
    now = time.time()
    found = [listed(row, machine, now) for row, machine in vm.rows(everything=options.all)]
    if options.json:
        output.print_json(found)
    elif options.quiet:
        print("".join(f"{one.id}\n" for one in found), end="")
    elif not found:
        print("no machines" if options.all else "no living machines; `cloister vm list --all` lists those that were")
    else:
        heads = ["NAME", "RUN", "IMAGE", "STATUS", "PID", "MEMORY", "UPTIME", "PORTS", "WORKSPACE"]
        cells = [_row(one) for one in found]
        if options.all:
            heads.insert(4, "EXIT")
            for row, one in zip(cells, found, strict=True):
                row.insert(4, _exit(one))
        print(output.table(heads, cells))


def _row(one: Listed) -> list[str]:
    ports = " ".join([*filter(None, [one.address]), *map(str, one.ports)])
    size = f"{one.memory_mib} MiB"
    return [
        one.name, one.id, one.image, one.status, str(one.pid or "-"), size, output.span(one.uptime), ports or "-",
        one.workspace,
    ]  # fmt: skip


def _exit(one: Listed) -> str:
    if one.exit_code is None:
        return "-"
    return str(one.exit_code) if one.reason == "exited" else f"{one.exit_code} {one.reason}"


def _stats(options: argparse.Namespace) -> None:
    if options.machine:
        chosen = [vm.machine(word) for word in options.machine]
    else:
        chosen = [(row.id, machine) for row, machine in vm.rows(everything=False) if row.status == "running"]
    found = [(run, vm_control.usage(machine), _inside(run)) for run, machine in chosen]
    if options.json:
        output.print_json([{"run": run, **msgspec.structs.asdict(one), "guest": said} for run, one, said in found])
    elif not found:
        print("no living machines")
    else:
        heads = ["RUN", "PID", "GUEST", "MAY USE", "IN USE INSIDE", "PROCESSES", "RESIDENT", "SHARE (PSS)", "CPU"]
        print(output.table(heads, [_figures(run, one, said) for run, one, said in found]))


def _inside(run: str) -> dict[str, int]:
    """Return what the guest says of itself: not to be relied upon, and nothing where it does not answer."""
    with contextlib.suppress(CloisterError):
        return msgspec.convert(records.control({"verb": "vm-figures", "run": run}).get("figures"), dict[str, int])
    return {}


def _figures(run: str, one: vm_control.Usage, said: dict[str, int]) -> list[str]:
    used = said.get("memory_total", 0) - said.get("memory_available", 0)
    balloon = "-" if one.balloon_mib is None else f"{one.balloon_mib} MiB"
    return [
        run, str(one.pid or "-"), f"{one.memory_mib} MiB", balloon, output.size(used) if said else "-",
        str(said.get("processes", "-")), output.size(one.resident_bytes),
        output.size(one.proportional_bytes), f"{one.cpu_s:.1f} s",
    ]  # fmt: skip


def _balloon(options: argparse.Namespace) -> None:
    run, machine = vm.machine(options.machine)
    try:
        mib = parse_size(mebibytes(options.size)) // _MIB
    except ValueError as error:
        raise UsageError("balloon-size", str(error), remedy="cloister vm balloon RUN 256M") from None
    vm_control.set_balloon(machine, mib)
    if options.json:
        output.print_json({"run": run, "balloon_mib": mib})
        return
    print(f"{run} may use {mib} MiB")


def _keys(kind: type[msgspec.Struct]) -> str:
    return ", ".join(kind.__struct_fields__)
