"""`cloister up`: Start gateways of the system's policy, and wait until they answer."""

from __future__ import annotations

from cloister.cli import gateway_change
from cloister.cli.arguments import Parser


def parser() -> Parser:
    """Describe the verb."""
    return gateway_change.describe(
        "up",
        "Start gateways of the system's policy, and wait until they answer.",
        "The port is taken first. Ready means that a question went through the gateway to a model and came "
        "back; that its unit is active says less. What is declared and enabled starts with the system; this "
        "is for one that was stopped.",
        "start it, or all of its instances",
    )


def main(argv: list[str]) -> int:
    """Do it."""
    return gateway_change.change(parser(), argv, "start")
