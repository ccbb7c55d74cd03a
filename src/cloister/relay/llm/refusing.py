"""Writing a refusal to a client, in the shape of its protocol."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from cloister.llm import errors
from cloister.llm.errors import Refusal
from cloister.llm.routes import Route, Shape

if TYPE_CHECKING:
    from cloister.relay.exchange import Exchange


def refuse(exchange: Exchange, shape: Shape, refusal: Refusal) -> None:
    """Answer with a refusal, if the client is still there; an unread rest of its body ends the connection."""
    if exchange.connection.transport is None:
        return
    close = not (exchange.keep_alive and exchange.ended)
    head_only = exchange.method == "HEAD"
    answer = errors.response(shape, refusal, close=close, head_only=head_only, now=time.time())
    exchange.respond_whole(errors.status(shape, refusal), answer)


def no_provider(route: Route) -> Refusal:
    """Return the refusal of a route that no upstream of the agent serves."""
    names = " or ".join(route.protocols)
    return Refusal(404, "no-provider", f"no provider of this agent speaks {names} (llm.providers)", again=False)
