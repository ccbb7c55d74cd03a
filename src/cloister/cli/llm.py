"""`cloister llm`: the kill switch for model calls of an agent, and what recorded ones said."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import time

from cloister.cli import llm_recordings, output, records
from cloister.cli.arguments import Parser
from cloister.errors import PolicyError, StepError, UsageError
from cloister.runs import model_blocks
from cloister.runs.policies import PolicyFiles


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "llm",
        "Block an agent's model calls, allow them again, show who is blocked, or show recorded calls.",
        prose=(
            "`block` counts at once and for every run of the agent, also after a restart: calls under way are ended, "
            "new ones are refused with the reason agent-blocked. Runs go on; only their model does not answer. A name "
            "that the policy does not have is blocked as well, and said. "
            "`recordings` lists the calls of a run whose policy has `llm = { record = true }`, or prints what one of "
            "them sent and got. They are encrypted with this user's key store (`cloister identity`), and are removed "
            "with the run."
        ),
        examples=(
            ("cloister llm block claude", "stop it from spending, now"),
            ("cloister llm unblock claude", "let it go on"),
            ("cloister llm status", "list who is blocked"),
            ("cloister llm recordings last", "list the recorded calls of the newest run"),
            ("cloister llm recordings last 3", "print the third of them: its request and its answer"),
        ),
    )
    verb.add_argument("action", choices=("block", "unblock", "status", "recordings"), help="what to do")
    verb.add_argument(
        "subject", metavar="AGENT|RUN", nargs="?", default="", help="the agent, or the run's id or `last`"
    )
    verb.add_argument("call", metavar="CALL", nargs="?", default="", help="number or id of a recorded call")
    verb.add_argument("--reason", metavar="TEXT", default="", help="told to the agent with each refusal")
    verb.json_option(
        "blocked (agents with their reasons), ended; for recordings: run, closed, damaged, calls (id, time, model, "
        "provider, route, stream, status, outcome, whole, request_bytes, request_kept, request_fields, answer_bytes, "
        "answer_kept, answers); with CALL: one such call, and bodies (what, text or base64)"
    )
    return verb


def main(argv: list[str]) -> int:
    """Do it.

    Raises:
        UsageError: no agent or run, one that is not blocked, or nothing was recorded.
        DeniedError: a recording was changed, or its key is missing.
        StepError: the state directory cannot be written.
    """
    options = parser().read(argv)
    if options.action == "recordings":
        if not options.subject:
            raise UsageError("run-missing", "name the run", remedy="cloister llm recordings last")
        return llm_recordings.show(options.subject, options.call, json=options.json)
    if options.call:
        raise UsageError("usage", f"`{options.action}` takes one agent", remedy="cloister help llm")
    return _switch(options)


def _switch(options: argparse.Namespace) -> int:
    """Block, allow or list agents."""
    path = records.places().blocked
    agents = model_blocks.blocked(path)
    ended = 0
    if options.action != "status":
        if not options.subject:
            raise UsageError("agent-missing", "name the agent", remedy=f"cloister llm {options.action} AGENT")
        agents = _changed(dict(agents), options.action, options.subject, options.reason)
        try:
            model_blocks.write(path, agents)
        except OSError as error:
            raise StepError("state-unwritable", f"cannot be written: {error.strerror}", where=path) from error
        if options.action == "block":
            _doubt(options.subject)
        if records.living() is not None:
            ended = int(records.control({"verb": "llm-blocked"})["ended"])
    if options.json:
        output.print_json({"blocked": dict(agents), "ended": ended})
        return 0
    for name, reason in sorted(agents.items()):
        print(f"{output.clean(name)}  {output.clean(reason)}")
    if not agents:
        print("no agent is blocked")
    if ended:
        print(f"{ended} calls under way were ended")
    return 0


def _changed(agents: dict[str, str], action: str, agent: str, reason: str) -> dict[str, str]:
    """Return who is blocked afterwards."""
    agents.pop(model_blocks.EVERYBODY, None)  # stands for a file that could not be read, which is written anew now
    if action == "block":
        when = time.strftime("%F %H:%M UTC", time.gmtime())
        agents[agent] = reason or f"by its owner, {when}"
    elif agents.pop(agent, None) is None:
        raise UsageError("agent-not-blocked", f"{agent!r} is not blocked", remedy="cloister llm status")
    return agents


def _doubt(agent: str) -> None:
    """Say that a name may be misspelt: it is blocked, and whoever was meant is not. A broken policy knows no names."""
    try:
        known = list(PolicyFiles(records.places(), os.getuid()).document().tables.get("agents", {}))
    except PolicyError:
        return
    if agent not in known:
        close = difflib.get_close_matches(agent, known, n=1)
        shown = f"did you mean {close[0]}?" if close else f"its agents: {', '.join(sorted(known)) or 'none'}"
        print(output.clean(f"cloister: the policy has no agent {agent!r}; {shown}"), file=sys.stderr)
