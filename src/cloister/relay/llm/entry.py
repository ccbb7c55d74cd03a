"""How a request finds its caller: by the socket of a run, or by the token it presents. Then it is read (`intake`)."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import NamedTuple

from cloister.egress.http1 import Headers
from cloister.llm import routes
from cloister.llm.errors import Refusal
from cloister.llm.routes import Route
from cloister.relay.exchange import Exchange
from cloister.relay.llm.heads import Heads
from cloister.relay.llm.intake import Intake
from cloister.relay.llm.refusing import refuse
from cloister.relay.llm.service import Caller, Inference

Identify = Callable[[list[str]], Caller | None]
"""Returns who presents these tokens, or None. Must not wait."""

_BEARER = b"bearer "


def of_run(caller: Callable[[], Caller]) -> Identify:
    """Return how the programs of one run are known: its socket says who it is, its placeholder that they were told."""

    def identify(tokens: list[str]) -> Caller | None:
        now = caller()
        expected = [text.encode() for text in (now.token, *now.former) if text]
        return now if any(hmac.compare_digest(token.encode(), one) for token in tokens for one in expected) else None

    return identify


class Asked(NamedTuple):
    """What a head that is known says: all that can be told of a request before its caller and its body."""

    route: Route
    tokens: list[str]
    heads: Heads


def handle(service: Inference, identify: Identify, exchange: Exchange) -> None:
    """Serve one request."""
    known = exchange.known
    asked = known.note if known is not None else None
    if isinstance(asked, Asked):
        caller = identify(asked.tokens)  # with every request: keys are taken away and runs end
        if caller is not None:
            Intake(service, caller, exchange, asked.route, asked.heads).start()
            return
    route = routes.find(exchange.method, exchange.url)
    if route is None or exchange.websocket:
        refuse(exchange, routes.shape_of(exchange.url), _no_route(exchange))
        return
    if route.name in {"probe", "health"}:
        close = b"" if exchange.keep_alive and exchange.ended else b"connection: close\r\n"
        exchange.respond_whole(200, b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n%b\r\n" % close)
        return
    tokens = presented(exchange.headers)
    caller = identify(tokens)
    if caller is None:
        what = "the key is not the one of this run" if tokens else "the request presents no key"
        words = f"{what}; the agent's key variables hold the right one"
        refuse(exchange, routes.shape_of(exchange.url), Refusal(401, "key-invalid", words, again=False))
        return
    if route.name == "models":
        route = routes.list_of("anthropic" if _speaks_anthropic(exchange.headers) else "chat")
    heads = Heads()
    if known is not None:
        known.note = Asked(route, tokens, heads)
    Intake(service, caller, exchange, route, heads).start()


def presented(headers: Headers) -> list[str]:
    """Return the tokens a client presents: Claude Code sends either field, by the variable it was given."""
    tokens = []
    for name, value in headers:
        lower = name.lower()
        if lower == b"authorization" and value[:7].lower() == _BEARER:
            tokens.append(value[7:].strip().decode("latin-1"))
        elif lower in {b"x-api-key", b"api-key"}:
            tokens.append(value.strip().decode("latin-1"))
    return tokens


def _speaks_anthropic(headers: Headers) -> bool:
    return any(name.lower() in {b"anthropic-version", b"x-api-key", b"anthropic-beta"} for name, _ in headers)


def _no_route(exchange: Exchange) -> Refusal:
    """Say why a request is none of ours. 426 makes Codex fall back from WebSocket to plain requests."""
    if exchange.websocket and exchange.url.startswith(b"/v1/responses"):
        return Refusal(426, "websocket-unsupported", "model traffic is served by POST, not over WebSocket", again=False)
    path = exchange.url.partition(b"?")[0][:100].decode("latin-1")
    words = f"{exchange.method} {path} is not served: this address is the proxy for model traffic"
    return Refusal(404, "route-unknown", words, again=False)
