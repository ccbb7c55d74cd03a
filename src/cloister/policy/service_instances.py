"""Which gateways a policy declares: each instance with everything it inherits from its service.

Raw tables are merged, since only they know which keys were written: tables key by key, lists as a whole. So an
instance inherits all of its service, and overrides a single key without losing those beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from cloister.policy.scanner import Path
from cloister.policy.services import Instance

ONLY = "default"
"""The name of a service's single instance."""


class Gateway(NamedTuple):
    """One instance of a service, with what it inherits."""

    service: str
    name: str
    settings: Instance
    path: Path
    """Its table in the policy, for messages: that of the service where it has no instances."""

    @property
    def label(self) -> str:
        """Return how people name it: `SERVICE`, or `SERVICE/INSTANCE`."""
        return self.service if self.name == ONLY else f"{self.service}/{self.name}"

    @property
    def joined(self) -> str:
        """Return its part of the names of units, accounts and directories."""
        return self.service if self.name == ONLY else f"{self.service}-{self.name}"


def gateways(tables: Mapping[str, Any]) -> tuple[Gateway, ...]:
    """Return every instance of every service of a policy whose form was checked, also those not enabled."""
    return tuple(each for name, table in tables.get("services", {}).items() for each in service_gateways(name, table))


def service_gateways(name: str, table: Mapping[str, Any]) -> tuple[Gateway, ...]:
    """Return the instances of one service.

    An instance is enabled unless it, or its service, says otherwise: who writes one wants it. A service without
    instances has to say so.
    """
    base = {key: value for key, value in table.items() if key != "instances"}
    instances = table.get("instances", {})
    if not instances:
        return (Gateway(name, ONLY, msgspec.convert(base, Instance), ("services", name)),)
    return tuple(
        Gateway(
            name,
            instance,
            msgspec.convert(_laid_over({"enable": True} | base, own), Instance),
            ("services", name, "instances", instance),
        )
        for instance, own in instances.items()
    )


def _laid_over(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        under = merged.get(key)
        merged[key] = _laid_over(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return merged
