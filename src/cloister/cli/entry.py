"""`cloister`: find the verb, call its file, turn errors into text and exit codes.

Verbs are imported one at a time. `run`, `exec` and `shell` speak env(1) (125 when Cloister
itself fails), all others sysexits(3).
"""

from __future__ import annotations

import os
import sys

from cloister.errors import EXIT_BUG, CloisterError, UsageError, render

RUNNERS = ("run", "exec", "shell")
VERBS = {
    "run": "start an agent in its sandbox",
    "shell": "open a shell in an agent's sandbox, or in a running one",
    "exec": "run another command in a running sandbox",
    "ps": "list runs",
    "logs": "show the output or the events of a run",
    "inspect": "show everything known about a run",
    "receipt": "show what a finished run did, and under which rules",
    "stop": "end a run",
    "audit": "ask the log of what agents did: follow it, search it, count",
    "timeline": "show what happened in a run, in order, as text or as a page",
    "usage": "show what model calls used and cost",
    "why": "list what a run was denied, and the line that would allow it",
    "learn": "propose a policy from what a run wanted",
    "diff": "show what a run changed in overlay mode",
    "apply": "copy changes of a run into the workspace; alone: make the system as its policy says",
    "discard": "throw changes of a run away",
    "init": "write a commented policy for the agents found here",
    "check": "check policy files",
    "plan": "show what would be done for a run",
    "explain": "say whether a path or a host is within an agent's reach, and by which rule",
    "agents": "list the agents of the policy",
    "login": "log in to a provider for runs that never see the tokens; list logins",
    "logout": "end logins",
    "policy": "reload the policy of running sandboxes; print its schema",
    "identity": "show, verify, revoke and rotate the keys and tokens of agents",
    "llm": "block an agent's model calls, or allow them again",
    "metrics": "print the broker's numbers for Prometheus",
    "doctor": "say what this host can enforce, and what to do about the rest",
    "prove": "attack an agent's sandbox and report what stopped each attack",
    "setup": "install the daemons, accounts and files that agents as system users need",
    "status": "show the system's daemons, services, accounts and living units",
    "up": "start gateways, and wait until they answer",
    "down": "stop gateways",
    "restart": "restart gateways, and wait until they answer",
    "uninstall": "take out of the system what setup and apply put there",
    "vm": "start, list and keep the virtual machines of agents",
    "image": "build, sign, verify and list guest images of microVMs",
    "gc": "remove old records, history of vanished projects, and leftovers",
    "completion": "print a script that completes words in bash, zsh or fish",
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    _fill_standard_streams()
    verb = words[0] if words else ""
    if verb == "help" and words[1:2] and words[1] in VERBS:
        verb, words = words[1], [words[1], "--help"]
    if verb in ("-h", "--help", "help", ""):
        sys.stdout.write(usage())
        return 0 if verb else UsageError.exit_code
    if verb in ("-V", "--version", "version"):
        from cloister import __version__

        sys.stdout.write(f"cloister {__version__}\n")
        return 0
    runner = verb in RUNNERS or words[:2] == ["vm", "exec"]
    try:
        code = _call(verb, words[1:])
        sys.stdout.flush()
    except CloisterError as error:
        sys.stderr.write(render(error) + "\n")
        if not runner and "--json" in words[1:]:
            _print_json(error)
        if runner:
            return error.exit_code if error.exit_code in (126, 127) else 125
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has seen enough, as with `cloister ps | head`; nothing more may be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception:  # noqa: BLE001  # a bug: told as one, and never taken for the command's own exit code
        import traceback

        traceback.print_exc()
        return 125 if runner else EXIT_BUG
    return code


def _fill_standard_streams() -> None:
    """Open /dev/null where standard input, output or error is closed.

    Else what is opened next would take their numbers: the broker's socket would be the agent's input. Python has None
    in place of such a stream.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115  # for good


def _call(verb: str, words: list[str]) -> int:
    if verb == "run":  # the measured path: no importlib
        from cloister.cli import run

        return run.main(words)
    if verb == "__complete":  # asked at every press of the tab key
        from cloister.cli import complete

        return complete.main(words)
    if verb not in VERBS:
        import difflib

        close = difflib.get_close_matches(verb, VERBS, n=1)
        raise UsageError(
            "verb-unknown", f"unknown command {verb!r}", remedy=f"cloister {close[0] if close else 'help'}"
        )
    import importlib

    # Text in an encoding that cannot hold it (LANG=C) is escaped rather than a traceback.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    module = importlib.import_module(f"cloister.cli.{verb}")
    code: int = module.main(words)
    return code


def _print_json(error: CloisterError) -> None:
    """Tell programs as well: `{"error": {...}}` on standard output."""
    import json

    from cloister.errors import as_json

    sys.stdout.write(json.dumps({"error": as_json(error)}, indent=2) + "\n")
    sys.stdout.flush()


def usage() -> str:
    """Return the text of `cloister help`."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {what}" for verb, what in VERBS.items()]
    head = "usage: cloister VERB [ARGUMENT...]\n\nRun AI agents where they cannot hurt their owner.\n\n"
    return head + "\n".join(lines) + "\n\n`cloister VERB --help` explains each; cloister(1) has the whole story.\n"
