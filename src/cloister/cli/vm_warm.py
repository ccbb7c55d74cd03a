"""`cloister vm warm`, `snapshots` and `rm`: templates made by hand; what is kept, and removing it."""

from __future__ import annotations

import argparse
import sys
import time

import msgspec

from cloister.cli import output, records
from cloister.cli.arguments import Parser
from cloister.cli.vm_start import mebibytes
from cloister.host.owner import identify
from cloister.runs import vm_warm_up

_TEMPLATE_LETTERS = 12
"""Of a template's name, which is a digest: its beginning is enough for `vm rm`."""


def describe(actions: argparse._SubParsersAction[Parser]) -> None:
    """Add the actions."""
    warm = actions.add_parser("warm", help="make templates now, so that the next starts are fast")
    warm.add_argument("name", metavar="NAME", help="an agent, or an image: all agents of the policy with it")
    warm.add_argument("--mem", metavar="MIB", default="", help="for starts with this memory, less than the policy's")
    warm.add_argument("--cpus", metavar="N", default="", help="for starts with fewer processors than the policy's")
    warm.add_argument("--json", action="store_true", help="print JSON with the keys agent, name, new, boot_s, bytes")
    kept = actions.add_parser("snapshots", help="list templates and snapshots")
    kept.add_argument(
        "--json", action="store_true", help=f"print JSON with the keys {', '.join(vm_warm_up.Kept.__struct_fields__)}"
    )
    gone = actions.add_parser("rm", help="remove a snapshot, or a template by the beginning of its name")
    gone.add_argument("name", metavar="NAME", nargs="+", help="as `vm snapshots` lists it")


def main(options: argparse.Namespace) -> int:
    """Do one of the actions.

    Raises:
        CloisterError: a template cannot be made, or there is nothing of that name.
    """
    places = records.places()
    match options.action:
        case "warm":
            _warm(options)
        case "snapshots":
            rows = vm_warm_up.kept(places)
            if options.json:
                output.print_json(rows)
            elif rows:
                heads = ["NAME", "KIND", "IMAGE", "MEMORY", "MADE", "SIZE", "AGENT", "WORKSPACE"]
                print(output.table(heads, [_row(row) for row in rows]))
            else:
                print("no templates and no snapshots")
        case _:
            for name in options.name:
                print(f"removed {vm_warm_up.forget(places, name)}")
    return 0


def _warm(options: argparse.Namespace) -> None:
    done = vm_warm_up.warm_up(
        records.places(), identify(), options.name, memory=mebibytes(options.mem), cpus=options.cpus, say=_say
    )
    if options.json:
        output.print_json([
            {
                "agent": one.agent, "name": one.template.shape.key(), "new": one.new,
                "boot_s": one.template.boot_s, "bytes": one.template.stored_bytes,
            }
            for one in done
        ])  # fmt: skip
        return
    for one in done:
        size = output.size(one.template.stored_bytes)
        what = "made" if one.new else "there already"
        print(f"{one.agent}: {one.template.shape.describe()}: {what}, {size}, booted in {one.template.boot_s} s")


def _row(row: vm_warm_up.Kept) -> list[str]:
    kept = msgspec.structs.asdict(row)
    memory = f"{row.memory_mib} MiB" if row.memory_mib else "-"
    made = output.ago(row.made, time.time())
    name = row.name[:_TEMPLATE_LETTERS] if row.kind == "template" else row.name
    return [name, row.kind, row.image, memory, made, output.size(kept["stored_bytes"]), row.agent or "-",
            row.workspace or "-"]  # fmt: skip


def _say(line: str) -> None:
    sys.stderr.write(f"cloister: {line}\n")
