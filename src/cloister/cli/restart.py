"""`cloister restart`: Restart gateways, and wait until they answer."""

from __future__ import annotations

from cloister.cli import gateway_change
from cloister.cli.arguments import Parser


def parser() -> Parser:
    """Describe the verb."""
    return gateway_change.describe(
        "restart",
        "Restart gateways, and wait until they answer.",
        "Its port stays taken meanwhile, so that nobody else can stand there. Changes of the policy are for "
        "`cloister apply`, which restarts what they concern.",
        "restart it, or all of its instances",
    )


def main(argv: list[str]) -> int:
    """Do it."""
    return gateway_change.change(parser(), argv, "restart")
