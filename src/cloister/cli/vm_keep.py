"""`cloister vm snapshot`, `restore` and `fork`: keep a machine as it is, and start others from it."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys

from cloister.cli import output, records, vm
from cloister.cli.arguments import Parser
from cloister.cli.vm_start import DETACHED
from cloister.errors import RetryError, UsageError
from cloister.host import vm_snapshot
from cloister.plan.vm_snapshot import Memory
from cloister.runs import client

_MOST_FORKS = 64
_SYNC_S = 30
_START_S = 120


def describe(actions: argparse._SubParsersAction[Parser]) -> None:
    """Add the actions."""
    snapshot = actions.add_parser("snapshot", help="keep a living machine under a name: memory and disks")
    snapshot.add_argument("machine", metavar="MACHINE", help="a run or an agent")
    snapshot.add_argument("name", metavar="NAME", help="what it shall be called")
    snapshot.add_argument("--disks", action="store_true", help="keep the disks, and not the memory")
    snapshot.add_argument(
        "--json", action="store_true", help="print JSON with the keys run, name, paused_s, memory, why"
    )
    restore = actions.add_parser("restore", help="start a machine that goes on from a snapshot, and print its id")
    restore.add_argument("name", metavar="NAME", help="a snapshot; another command may follow, after `--`")
    restore.add_argument("--disks", action="store_true", help="begin anew with its disks")
    restore.add_argument("--attach", action="store_true", help="stay with it: its streams, or its terminal, are ours")
    restore.add_argument("--json", action="store_true", help="print JSON with the key run")
    fork = actions.add_parser("fork", help="start more machines that go on from one as it is now; print their ids")
    fork.add_argument("machine", metavar="MACHINE", help="a run or an agent")
    fork.add_argument("-n", type=int, default=1, metavar="N", dest="count", help="how many (1)")


def main(options: argparse.Namespace) -> int:
    """Do one of the actions.

    Raises:
        CloisterError: no such machine or snapshot, or it cannot be kept.
    """
    match options.action:
        case "snapshot":
            if vm_snapshot.is_throwaway(options.name):
                raise UsageError(
                    "snapshot-name",
                    "such names are for what `vm fork` throws away",
                    remedy="cloister vm snapshot RUN NAME",
                )
            kept = _take(options.machine, options.name, disks=options.disks)
            if options.json:
                output.print_json(kept)
            else:
                what = "memory and disks" if kept["memory"] else "the disks"
                print(f"{kept['name']}: {what} of {kept['run']}, which stood still for {kept['paused_s']} s")
                _say_why(kept)
        case "restore":
            _restore(options)
        case _:
            _fork(options)
    return 0


def _say_why(kept: dict[str, object]) -> None:
    """Say why the memory was not kept, where somebody might have expected it."""
    if kept["why"]:
        sys.stderr.write(f"cloister: the disks only: {kept['why']}\n")


def _take(word: str, name: str, *, disks: bool = False) -> dict[str, object]:
    run, _ = vm.machine(word)
    vm_snapshot.check_name(name)
    # What the guest has not written yet would be missing. A guest that does not obey gets what its journal holds.
    null = subprocess.DEVNULL
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            ourselves("exec", "--no-pty", run, "--", "sync"),
            timeout=_SYNC_S,
            check=False,
            stdin=null,
            stdout=null,
            stderr=null,
        )
    return records.control({"verb": "vm-snapshot", "run": run, "name": name, "disks": "1" if disks else ""})


def _restore(options: argparse.Namespace) -> None:
    """Ask the broker and become the shim, which prints the id, or stays."""
    record = vm_snapshot.read(records.places().snapshots, options.name)
    memory = None if options.disks or options.command else record.memory
    fields = {
        **DETACHED,
        "agent": record.agent,
        "profile": record.profile,
        "replaced": "1",
        "directory": record.workspace,
        "snapshot": record.name,
        "json": "1" if options.json else "",
    }
    if memory:
        fields |= _as_it_was(memory)
    else:
        sys.stderr.write(f"cloister: begins anew, with the disks of {record.name}\n")
    if options.attach:
        fields["detach"] = ""
        terminal = os.isatty(0) and os.isatty(1)
        fields["pty"] = "1" if terminal and (memory.pty if memory else True) else ""
    words = options.command or list(record.asked)
    client.become_shim(client.request(fields, words, (0, 1, 2)))


def _as_it_was(memory: Memory) -> dict[str, str]:
    """Return what its caller had narrowed or named: a machine goes on as it was, or not at all."""
    return {
        "resume": "1",
        "directory": memory.directory,
        "memory": f"{memory.shape.memory_mib}M",
        "cpus": str(memory.shape.cpus),
        "model": memory.model,
        "env": ",".join(memory.extra_names),
    }


def _fork(options: argparse.Namespace) -> None:
    if not 1 <= options.count <= _MOST_FORKS:
        raise UsageError("fork-count", f"between 1 and {_MOST_FORKS} at once", remedy="cloister vm fork RUN -n 2")
    name, root = vm_snapshot.throwaway_name(), records.places().snapshots
    _say_why(_take(options.machine, name))
    with vm_snapshot.throwaway(root, name):
        for _ in range(options.count):
            done = subprocess.run(
                ourselves("vm", "restore", name), stdin=subprocess.DEVNULL, timeout=_START_S, check=False
            )
            if done.returncode:
                raise RetryError(
                    "fork-failed", "one of them did not start; those before it live", remedy="cloister vm list"
                )


def ourselves(*words: str) -> list[str]:
    """Return the argv of another `cloister`."""
    return [sys.executable, "-I", "-m", "cloister", *words]
