"""`cloister vm cp`: copy a file or a directory out of a machine, or into one that lives.

A living machine does it by `tar` in the guest; of one that does not run its disk is read (`runs/vm_stopped`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
from collections.abc import Callable
from functools import partial
from typing import IO, TypeAlias

from cloister.cli import records, vm
from cloister.cli.arguments import Parser
from cloister.cli.vm_keep import ourselves
from cloister.errors import StepError, UsageError
from cloister.host import vm_copy
from cloister.policy.units import parse_size

_Copied: TypeAlias = tuple[int, tuple[str, ...]]
_OUT = 'cd -- "$(dirname -- "$1")" && exec tar -cf - -- "$(basename -- "$1")"'
_IN = (
    'd=$(mktemp -d) && tar -C "$d" -xf - && if [ -d "$1" ]; then set -- "$1/$2" "$2"; fi && '
    'if [ -e "$1" ] && [ -d "$d/it" ]; then echo "$1 is there already" >&2; exit 1; fi && '
    'mv -- "$d/it" "$1" && rmdir "$d"'
)


def describe(actions: argparse._SubParsersAction[Parser]) -> None:
    """Add the action."""
    copy = actions.add_parser("cp", help="copy a file or a directory out of a machine or a snapshot, or into a machine")
    copy.add_argument("source", metavar="SOURCE", help="MACHINE:PATH, SNAPSHOT:PATH, or a path here")
    copy.add_argument("target", metavar="TARGET", help="a path here, or MACHINE:PATH")
    copy.add_argument("--max", metavar="SIZE", default="1G", help="refuse to take out more than this (1G)")


def main(options: argparse.Namespace) -> int:
    """Copy.

    Raises:
        CloisterError: no such machine or file; nothing is left of a copy out that failed.
    """
    source, target = _place(options.source), _place(options.target)
    if bool(source[0]) == bool(target[0]):
        raise UsageError("copy-sides", "one of the two is MACHINE:PATH, the other a path here",
                         remedy="cloister vm cp last:/workspace/file .")  # fmt: skip
    if source[0]:
        _out(source[0], source[1], target[1], _size(options.max))
    else:
        _in(source[1], target[0], target[1])
    return 0


def _out(word: str, path: str, target: str, most: int) -> None:
    run = vm.living_machine(word)
    take = partial(vm_copy.take_out, target=target, most_bytes=most)
    if run:
        count, left = _out_of_guest(run, path, take)
    else:
        from cloister.runs.vm_stopped import find_stopped, take_from

        count, left = take_from(find_stopped(records.places(), records.store(), word), path, take)
    print(f"{count} files and directories")
    for name in left[:10]:
        print(f"left out, neither file nor directory: {name!r}")


def _out_of_guest(run: str, path: str, take: Callable[[IO[bytes]], _Copied]) -> _Copied:
    argv = ourselves("exec", "--no-pty", run, "--", "sh", "-c", _OUT, "cp", path)
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as guest:
        assert guest.stdout is not None  # noqa: S101  # asked for above
        try:
            return take(guest.stdout)
        finally:
            guest.stdout.close()
            guest.kill()


def _in(path: str, word: str, target: str) -> None:
    run, _ = vm.machine(word)
    argv = ourselves(
        "exec", "--no-pty", run, "--", "sh", "-c", _IN, "cp", target, os.path.basename(os.path.abspath(path))
    )
    with subprocess.Popen(argv, stdin=subprocess.PIPE) as guest:
        assert guest.stdin is not None  # noqa: S101  # asked for above
        try:
            vm_copy.send_in(guest.stdin, path)
        except BrokenPipeError:
            pass
        finally:
            with contextlib.suppress(BrokenPipeError):
                guest.stdin.close()
        code = guest.wait()
    if code:
        raise StepError("copy-failed", f"the guest could not take it (exit code {code})", where=f"{word}:{target}")


def _place(text: str) -> tuple[str, str]:
    """Return machine and path; no machine for a path here."""
    machine, colon, path = text.partition(":")
    if not colon or "/" in machine:
        return "", text
    if not path.startswith("/"):
        raise UsageError(
            "copy-path", "a path in a machine begins with /", where=text, remedy=f"{machine}:/workspace/{path}"
        )
    return machine, path


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError("copy-size", f"--max: {error}", remedy="--max 4G") from None
