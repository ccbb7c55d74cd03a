"""Gateways that are installed: by which names people call them, and whether they are ready.

What is installed for one is `service_files`; doing it is `cloister apply`. Here are those of the system's policy as
it is now; for what they do, systemd is asked.
"""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Iterable

from cloister.errors import StepError, UsageError
from cloister.host import gateway_manager, ports
from cloister.host.private_files import read
from cloister.host.system_probe import properties
from cloister.isolation.service_units import DESCRIPTION, port_units, unit_name
from cloister.policy.document import show_path
from cloister.policy.model import Policy
from cloister.policy.service_check import PRODUCT
from cloister.policy.service_instances import Gateway
from cloister.runs.service_files import UNITS, active
from cloister.runs.system_setup import Read

START_S = 90.0
"""A gateway takes ten seconds to come up on an idle machine, and its first answer some more."""
ANSWER_S = 60.0
UNKNOWN = "unknown"
_PAUSE_S = 0.5
_UNASKED = (UNKNOWN, "not asked")


def chosen(found: Read, words: Iterable[str]) -> tuple[Gateway, ...]:
    """Return the gateways that words name: `SERVICE` is all of its instances, `SERVICE/INSTANCE` one.

    Raises:
        UsageError: `service-unknown`, or `service-not-installed` where `cloister apply` comes first.
    """
    gateways = active(found.document)
    picked: list[Gateway] = []
    for word in words:
        these = [one for one in gateways if word in {one.service, one.label, f"{one.service}/{one.name}"}]
        if not these:
            known = ", ".join(one.label for one in gateways)
            remedy = f"one of {known}" if known else "write [services.NAME], then: sudo cloister apply"
            raise UsageError("service-unknown", f"no service is called {word[:60]!r}", remedy=remedy)
        picked += these
    for one in picked:
        if not os.path.exists(f"{UNITS}/{unit_name(one.joined)}"):
            message = f"the gateway {one.label} is not installed yet"
            raise UsageError("service-not-installed", message, remedy="sudo cloister apply")
    return tuple({one.joined: one for one in picked}.values())


def units_of(gateways: Iterable[Gateway], *, ports: bool = True) -> tuple[str, ...]:
    """Return the units to start or stop: the port first, so that nobody else has it; or without the port."""
    found = ((port_units(one.joined)[0], unit_name(one.joined)) for one in gateways)
    return tuple(unit for pair in found for unit in (pair if ports else pair[1:]))


def refuse_taken(these: Iterable[Gateway]) -> None:
    """Say which gateway's port somebody else has, after systemd could not take it.

    Raises:
        StepError: `port-taken`; the gateway itself may run.
    """
    for one in these:
        port, socket = one.settings.port, port_units(one.joined)[0]
        held = properties((socket,), ("ActiveState",)).get(socket, {}).get("ActiveState") == "active"
        if not held and ports.taken(port):
            message = f"port {port} of the gateway {one.label} is taken by another program"
            remedy = f"ss -ltnp 'sport = :{port}' shows which; or another port in its table"
            raise StepError("port-taken", message, where=show_path((*one.path, "port")), remedy=remedy)


def units_of_word(word: str) -> tuple[str, ...]:
    """Return the units of installed gateways by a name, of a service or one of its instances; anybody may ask."""
    found = []
    for path in sorted(glob.glob(f"{UNITS}/{unit_name('*')}")):
        with open(path, encoding="utf-8") as file:
            label = next((line for line in file if line.startswith(DESCRIPTION)), "").removeprefix(DESCRIPTION).strip()
        if word.removesuffix("/default") in {label, label.partition("/")[0]}:
            found.append(os.path.basename(path))
    return tuple(found)


def readiness(gateway: Gateway, policy: Policy, timeout_s: float) -> str:
    """Return an empty text where a gateway has just answered through its model, else why it is not ready.

    For root, who may read its token. A gateway of another program is asked what its table says; where that says
    nothing, the answer is that nobody knows (`UNKNOWN`).
    """
    auth, ready = gateway.settings.auth, gateway.settings.ready
    if policy.agents[gateway.settings.agent].preset != PRODUCT:
        if ready:
            return gateway_manager.question(gateway.settings.port, ready, timeout_s)
        state = properties((unit_name(gateway.joined),), ("ActiveState",)).get(unit_name(gateway.joined), {})
        lives = state.get("ActiveState") == "active"
        return f'{UNKNOWN}: ready = "/PATH" in its table would tell' if lives else "does not run"
    scheme, _, path = getattr(auth, auth.mode).partition(":")
    secret = read(path) if scheme == "file" else None
    if secret is None:
        return "not asked: its token is not in a private file of root's"
    return gateway_manager.round_trip(gateway.settings.port, secret.decode("utf-8", "replace").strip(), timeout_s)


def unasked(why: str) -> bool:
    """Say whether nobody knows if a gateway is ready, because it could not be asked."""
    return why.startswith(_UNASKED)


def wait_ready(gateway: Gateway, policy: Policy, timeout_s: float = START_S) -> str:
    """Ask a gateway until it is ready or the time is over; return as `readiness`."""
    end = time.monotonic() + timeout_s
    while True:
        why = readiness(gateway, policy, ANSWER_S)
        if not why or unasked(why) or time.monotonic() > end:
            return why
        time.sleep(_PAUSE_S)
