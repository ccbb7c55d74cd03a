"""`cloister down`: Stop gateways; they start again with the system, or by `cloister up`."""

from __future__ import annotations

from cloister.cli import gateway_change
from cloister.cli.arguments import Parser


def parser() -> Parser:
    """Describe the verb."""
    return gateway_change.describe(
        "down",
        "Stop gateways; they start again with the system, or by `cloister up`.",
        "A gateway gets up to 330 seconds to finish what it is at. To have one never start again, write "
        "`enable = false` into its table and type `sudo cloister apply`.",
        "stop it, or all of its instances",
    )


def main(argv: list[str]) -> int:
    """Do it."""
    return gateway_change.change(parser(), argv, "stop")
