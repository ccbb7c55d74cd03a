"""Which requests are model traffic: method and path to a route. It reads no body and knows no upstream.

The path is matched, not the whole target: Claude Code asks for `/v1/messages?beta=true`. A path counts exactly as it
stands here; another spelling of it (escapes, dots, doubled slashes) is no route, so nothing is decided for one path
and forwarded to another.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from cloister.policy.model import Protocol

Shape = Literal["anthropic", "chat", "responses"]
"""Whose requests, answers, errors and lists these are; embeddings and lists of OpenAI count as `chat`."""

_QUERY = re.compile(rb"[\x21-\x7e]*")


class Route(NamedTuple):
    """One thing an agent may ask for."""

    name: str
    """As in the ledger: `messages`, `count_tokens`, `chat`, `responses`, `embeddings`, `models`; `probe`, `health`."""
    shape: Shape
    path: str
    """What is appended to the upstream's base URL."""
    protocols: tuple[Protocol, ...] = ()
    """Upstreams that serve it."""
    limits: tuple[str, ...] = ()
    """Keys of the body that bound the output; the first is the one we add where none is given."""
    metered: bool = False
    """Whether it uses tokens that cost."""


_MESSAGES = Route("messages", "anthropic", "/v1/messages", ("anthropic",), ("max_tokens",), metered=True)
_COUNT = Route("count_tokens", "anthropic", "/v1/messages/count_tokens", ("anthropic",))
_CHAT = Route(
    "chat", "chat", "/v1/chat/completions", ("openai", "openai-responses"),
    ("max_tokens", "max_completion_tokens"), metered=True,
)  # fmt: skip
_RESPONSES = Route(
    "responses", "responses", "/v1/responses", ("openai-responses",), ("max_output_tokens",), metered=True
)
_EMBEDDINGS = Route("embeddings", "chat", "/v1/embeddings", ("openai", "openai-responses"), metered=True)
_MODELS_ANTHROPIC = Route("models", "anthropic", "/v1/models", ("anthropic",))
_MODELS_OPENAI = Route("models", "chat", "/v1/models", ("openai", "openai-responses"))
_PROBE = Route("probe", "anthropic", "/")
_HEALTH = Route("health", "chat", "/healthz")

_ROUTES = {
    ("POST", b"/v1/messages"): _MESSAGES,
    ("POST", b"/v1/messages/count_tokens"): _COUNT,
    ("POST", b"/v1/chat/completions"): _CHAT,
    ("POST", b"/v1/responses"): _RESPONSES,
    ("POST", b"/v1/embeddings"): _EMBEDDINGS,
    ("GET", b"/v1/models"): _MODELS_OPENAI,
    ("HEAD", b"/"): _PROBE,
    ("GET", b"/healthz"): _HEALTH,
}


def find(method: str, target: bytes) -> Route | None:
    """Return the route of an origin-form request target (RFC 9112, section 3.2.1), or None."""
    path, mark, query = target.partition(b"?")
    if mark and not _QUERY.fullmatch(query):
        return None
    return _ROUTES.get((method, path))


def query_of(target: bytes) -> str:
    """Return the query with its question mark, or nothing. `find` has made sure of its characters."""
    mark = target.find(b"?")
    return "" if mark < 0 else target[mark:].decode("ascii")


def list_of(shape: Shape) -> Route:
    """Return the route by which a client of this shape lists models: both protocols use one path for it."""
    return _MODELS_ANTHROPIC if shape == "anthropic" else _MODELS_OPENAI


def shape_of(target: bytes) -> Shape:
    """Return whose error shape fits a request that has no route."""
    if target.startswith(b"/v1/messages"):
        return "anthropic"
    return "responses" if target.startswith(b"/v1/responses") else "chat"
