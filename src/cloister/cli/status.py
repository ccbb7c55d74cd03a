"""`cloister status`: how the system's installation stands, and what lives on it."""

from __future__ import annotations

import os

from cloister.cli.arguments import Parser
from cloister.cli.output import colour, pairs, print_json, size, table
from cloister.errors import DeniedError
from cloister.plan.unit import Account
from cloister.runs.gateways import unasked
from cloister.runs.system_status import Status, UnitLine, status

NOT_INSTALLED = 69
NOT_AS_DECLARED = 1


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "status",
        "Show the system's daemons, services, accounts and living units.",
        prose=(
            "For agents that run as system users. Root also learns whether the system is as its policy says, that is "
            "whether `cloister apply` would find anything to do. Your own runs in namespaces are in `cloister ps`."
        ),
        examples=(("sudo cloister status", "is all as declared?"),),
        exits=(
            (
                "1",
                "a daemon failed, a gateway does not answer or lacks its port, or the system is not as declared",
            ),
            ("69", "nothing is installed"),
        ),
    )
    verb.add_argument(
        "--ready", action="store_true",
        help="ask each gateway for an answer through its model (root; costs a model call each)",
    )  # fmt: skip
    verb.json_option("installed, as_declared, trouble, daemons, services, runs, accounts, grants, bridge")
    return verb


def main(argv: list[str]) -> int:
    """Show it.

    Raises:
        DeniedError: gateways were to be asked, by somebody else than root.
    """
    options = parser().read(argv)
    root = os.geteuid() == 0
    if options.ready and not root:
        raise DeniedError(
            "root-needed",
            "only root reads the tokens with which gateways are asked",
            remedy="sudo cloister status --ready",
        )
    found = status(root=root, ask=options.ready)
    if options.json:
        print_json(found)
    else:
        print(render(found))
    if not found.installed:
        return NOT_INSTALLED
    failed = any(line.state == "failed" for line in (*found.daemons, *found.services))
    failed |= any(line.ready not in {"", "yes"} and not unasked(line.ready) for line in found.services)
    failed |= any(line.port_held is False for line in found.services)
    return NOT_AS_DECLARED if failed or found.as_declared is False or found.trouble else 0


def render(found: Status) -> str:
    """Return the page for people."""
    if not found.installed:
        return "Cloister is not a part of this system (sudo cloister setup); your own runs need none of this"
    declared = {True: "as its policy says", False: "NOT as its policy says: sudo cloister apply", None: found.trouble}
    parts = [pairs([("system", declared[found.as_declared])])] if found.as_declared is not None or found.trouble else []
    parts.append(table(("DAEMON", "STATE", "SINCE"), [(line.unit, _state(line), line.since) for line in found.daemons]))
    if found.bridge:
        parts.append(pairs([("bridge of microVMs", found.bridge)]))
    if found.services:
        asked = any(line.ready for line in found.services)
        rows = [
            (line.unit, _state(line), _port(line), *([line.ready] if asked else []), *_rest(line))
            for line in found.services
        ]
        heads = ("SERVICE", "STATE", "PORT", *(["READY"] if asked else []), "ACCOUNT", "MEMORY", "SINCE")
        parts.append(table(heads, rows))
    if found.runs:
        rows = [(line.unit, _state(line), *_rest(line)) for line in found.runs]
        parts.append(table(("RUN", "STATE", "ACCOUNT", "MEMORY", "SINCE"), rows))
    if found.accounts:
        roots = {grant.account: " ".join(grant.roots) for grant in found.grants}
        rows = [
            (one.name, str(one.uid), one.service or one.agent, one.user or "-", _roots(one, roots))
            for one in found.accounts
            if one.user or one.service
        ]
        parts.append(table(("ACCOUNT", "UID", "AGENT", "USER", "ROOTS"), rows))
    return "\n\n".join(parts)


def _port(line: UnitLine) -> str:
    return "-" if line.port is None else str(line.port) if line.port_held else colour(f"{line.port} (not held)", "red")


def _roots(account: Account, roots: dict[str, str]) -> str:
    return "-" if account.service else roots.get(account.name, "not granted")


def _rest(line: UnitLine) -> tuple[str, str, str]:
    return line.account, _memory(line), line.since


def _state(line: UnitLine) -> str:
    state = line.state if line.detail in {"", line.state} else f"{line.state} ({line.detail})"
    return colour(state, "red") if line.state == "failed" else state


def _memory(line: UnitLine) -> str:
    return "" if line.memory_bytes is None else size(line.memory_bytes)
