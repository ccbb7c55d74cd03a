"""What `cloister up`, `down` and `restart` share: names in, systemd told, readiness reported."""

from __future__ import annotations

import os
import sys

from cloister.cli.arguments import Parser
from cloister.cli.output import print_json
from cloister.errors import StepError
from cloister.host import gateway_manager
from cloister.policy.service_instances import Gateway
from cloister.runs import gateways, system_setup

NOT_READY = 1


def describe(verb: str, summary: str, prose: str, example: str) -> Parser:
    """Describe one of the three verbs."""
    parser = Parser(
        verb,
        summary,
        prose=prose,
        examples=((f"sudo cloister {verb} home", example), (f"sudo cloister {verb} home/work", "one instance of it")),
        exits=((str(NOT_READY), "a gateway runs, and does not answer through its model"),) if verb != "down" else (),
    )
    parser.add_argument("names", metavar="NAME[/INSTANCE]", nargs="+", help="a service, or one of its instances")
    if verb != "down":
        parser.add_argument("--no-wait", action="store_true", help="do not wait until it answers through its model")
    parser.json_option("service, port, ready (null: nobody knows), why (a list)")
    return parser


def change(parser: Parser, argv: list[str], verb: str) -> int:
    """Do it; wait until what was started is ready.

    Raises:
        DeniedError: `not-root`.
        UsageError: `service-unknown`, `service-not-installed`.
        StepError: `gateway-failed`, by systemd's word; `port-taken`.
    """
    options = parser.read(argv)
    system_setup.require_root(parser.verb, os.geteuid())
    found = system_setup.read_policy()
    these = gateways.chosen(found, options.names)
    try:
        if verb == "restart":  # its port is held by another unit, which goes on
            gateway_manager.manage("stop", gateways.units_of(these, ports=False))
        gateway_manager.manage("start" if verb == "restart" else verb, gateways.units_of(these))
    except StepError:
        gateways.refuse_taken(these)
        raise
    asked = verb != "stop" and not options.no_wait
    answers = [(one, gateways.wait_ready(one, found.system.policy) if asked else "not asked") for one in these]
    if options.json:
        print_json([_line(one, why) for one, why in answers])
    else:
        for one, why in answers:
            state = "stopped" if verb == "stop" else f"runs on 127.0.0.1:{one.settings.port}"
            sys.stdout.write(f"{one.label} {state}{_words(why, asked=asked)}\n")
    return NOT_READY if asked and any(why and not gateways.unasked(why) for _, why in answers) else 0


def _line(one: Gateway, why: str) -> dict[str, object]:
    ready = None if gateways.unasked(why) else not why
    return {"service": one.label, "port": one.settings.port, "ready": ready, "why": why}


def _words(why: str, *, asked: bool) -> str:
    if not asked:
        return ""
    if gateways.unasked(why):
        return f"; whether it is ready is {why}" if why.startswith(gateways.UNKNOWN) else f"; {why}"
    return f", but {why}" if why else ", and answers"
