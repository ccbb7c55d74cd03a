"""Secrets of a gateway's channels that never come inside: placeholders there, swapped by the system's broker. Pure.

Each is a credential as an agent's own, bound to the hosts of its channel; the gateway reads the placeholder from a
file, as it would read the secret. What no placeholder can stand for, since it is compared inside or travels in
bodies, is delivered as it is (`openclaw_config.delivered_secrets`).
"""

from __future__ import annotations

from urllib.parse import urlsplit

import msgspec

from cloister.policy.model import Agent, Credential, Injection
from cloister.policy.service_instances import Gateway
from cloister.policy.services import Instance, ServiceSecret

TELEGRAM_SECRET = "telegram"  # noqa: S105 - a name
_HTTPS = 443


def swapped(settings: Instance) -> dict[str, Credential]:
    """Return them by the name of the unit's credential, which is that of the file inside."""
    found = {}
    telegram = settings.channels.telegram
    if telegram.enable:
        parts = urlsplit(telegram.api_root)
        # A Bot API server of one's own answers with paths of files that hold the token.
        inject = Injection(host=parts.hostname or "", port=parts.port or _HTTPS, scheme="path", value="bot{secret}")
        found[TELEGRAM_SECRET] = Credential(secret=telegram.bot_token, inject=inject, mask=True)
    for name, one in settings.secrets.items():
        if isinstance(one, ServiceSecret):
            found[named(name)] = Credential(secret=one.secret, inject=one.inject, mask=one.mask)
    return found


def with_channels(agent: Agent, gateway: Gateway) -> Agent:
    """Return the agent of a gateway with the credentials of its channels among its own."""
    more = swapped(gateway.settings)
    return msgspec.structs.replace(agent, credentials=agent.credentials | more) if more else agent


def named(secret: str) -> str:
    """Return the name of the unit's credential for one of `secrets`."""
    return f"secret-{secret}"
