"""`cloister metrics`: the broker's numbers in the text format of Prometheus, on standard output."""

from __future__ import annotations

import sys

import msgspec

from cloister.cli import records
from cloister.cli.arguments import Parser
from cloister.runs.metrics import Told


def parser() -> Parser:
    """Describe the verb."""
    return Parser(
        "metrics",
        "Print the broker's numbers in the text format of Prometheus.",
        prose=(
            "Living runs, and of model calls: requests, tokens, dollars and times by agent, model, provider and "
            "status, what was refused and why, calls under way, the used part of budgets, and how the ledger is. "
            "Counters begin at zero with the broker; `cloister usage` is what stays. Without a broker none is started: "
            "cloister_broker_up is 0 then, and the exit status 0 as well, so that a timer can write the file that the "
            "textfile collector of node_exporter reads. Names of agents and models are in it, no secret and no text."
        ),
        examples=(
            ("cloister metrics", "look"),
            (
                "cloister metrics > cloister.prom.new && mv cloister.prom.new cloister.prom",
                "for node_exporter --collector.textfile.directory",
            ),
        ),
    )


def main(argv: list[str]) -> int:
    """Print the text.

    Raises:
        BrokerError: what the broker refused.
    """
    parser().read(argv)
    answer = records.ask_living({"verb": "metrics"})
    from cloister.runs.metrics_text import render_broker

    models = answer["models"] if answer else None
    told = None if models is None else msgspec.convert(models, Told)
    sys.stdout.write(render_broker(answer["runs"] if answer else None, told).decode())
    return 0
