"""`cloister vm cp`: copy a file or a directory out of a living machine, or into it, by `tar` in the guest."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess

from cloister.cli import vm
from cloister.cli.arguments import Parser
from cloister.cli.vm_keep import ourselves
from cloister.errors import StepError, UsageError
from cloister.host import vm_copy
from cloister.policy.units import parse_size

_OUT = 'cd -- "$(dirname -- "$1")" && exec tar -cf - -- "$(basename -- "$1")"'
_IN = (
    'd=$(mktemp -d) && tar -C "$d" -xf - && if [ -d "$1" ]; then set -- "$1/$2" "$2"; fi && '
    'if [ -e "$1" ] && [ -d "$d/it" ]; then echo "$1 is there already" >&2; exit 1; fi && '
    'mv -- "$d/it" "$1" && rmdir "$d"'
)


def describe(actions: argparse._SubParsersAction[Parser]) -> None:
    """Add the action."""
    copy = actions.add_parser("cp", help="copy a file or a directory out of a machine, or into it")
    copy.add_argument("source", metavar="SOURCE", help="MACHINE:PATH, or a path here")
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
    run, _ = vm.machine(word)
    argv = ourselves("exec", "--no-pty", run, "--", "sh", "-c", _OUT, "cp", path)
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as guest:
        assert guest.stdout is not None  # noqa: S101  # asked for above
        try:
            count, left = vm_copy.take_out(guest.stdout, target, most_bytes=most)
        finally:
            guest.stdout.close()
            guest.kill()
    print(f"{count} files and directories")
    for name in left[:10]:
        print(f"left out, neither file nor directory: {name!r}")


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
