"""From a request's bytes to what will be sent and reserved: the decisions before a call. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from cloister.llm import estimate
from cloister.llm.access import Access
from cloister.llm.errors import NO_MODEL, Refusal
from cloister.llm.peek import BodyError, Edit, Peek, peek, put, put_usage, splice
from cloister.llm.routes import Route
from cloister.llm.tokens import Usage

_CODINGS = frozenset({b"gzip", b"x-gzip", b"deflate", b"br", b"zstd", b"compress"})
_STATUS = {"feature-unmetered": 403}
_OPENAI_OWN = ("api.openai.com", ".openai.azure.com")
"""Where newer models take no `max_tokens`; all compatible servers do."""


class Order(NamedTuple):
    """One call, ready to be reserved and sent."""

    model: str
    """What the upstream is asked for."""
    stream: bool
    body: bytes
    hides_usage: bool
    """Usage was asked for by us: the chunk that brings it is not the agent's."""
    demand: Usage
    """What the call may use at most."""


def read_order(body: bytes, route: Route, access: Access, cap: int | None, host: str = "") -> Order | Refusal:
    """Return what will be sent for a request, or why nothing will be.

    Args:
        body: as the client sent it.
        route: what it asks for.
        access: which models are allowed.
        cap: the policy's `max_tokens`.
        host: the upstream's, which decides how a missing bound of the output is written.
    """
    try:
        peeked = peek(body, route)
        meant = access.resolve(peeked.model)
        if meant is None:
            return _not_allowed(peeked.model, access)
        for further in peeked.models:
            if access.resolve(further) != further:
                return _not_allowed(further, access)
        edits = _edits(body, peeked, route, meant, cap, host)
    except BodyError as error:
        return Refusal(_STATUS.get(error.reason, 400), error.reason, error.explanation, again=False)
    sent = splice(body, edits)
    if not route.metered:
        return Order(meant, peeked.stream, sent, hides_usage=False, demand=Usage())
    inputs = estimate.input_tokens(body, peeked)
    outputs = estimate.output_tokens(peeked, cap) if route.limits else 0
    hides = route.name == "chat" and peeked.stream and not peeked.asks_usage
    return Order(meant, peeked.stream, sent, hides, estimate.usage(body, inputs, outputs))


def explained(refusal: Refusal, headers: Iterable[tuple[bytes, bytes]]) -> Refusal:
    """Return a refusal of a body; where the body was compressed, with that as the reason.

    Nothing is decompressed here. What another decoder would make of the same bytes (several members, a rest behind
    the end) could be another request than the one that was judged, and a few bytes could be gigabytes.
    """
    coding = b",".join(value for name, value in headers if name.lower() == b"content-encoding").strip().lower()
    if refusal.reason != "body-invalid" or coding in {b"", b"identity"}:
        return refusal
    name = coding.decode("ascii") if coding in _CODINGS else "a coding"
    words = (
        f"the body is compressed ({name}), and what cannot be read cannot be allowed: send it as it is "
        "(Codex: -c features.enable_request_compression=false)"
    )
    return Refusal(415, "body-compressed", words, again=False)


def _edits(  # noqa: PLR0913 - what the changes depend on
    body: bytes, peeked: Peek, route: Route, meant: str, cap: int | None, host: str
) -> list[Edit]:
    edits = []
    if meant != peeked.model:
        edits.append(put(peeked, "model", msgspec.json.encode(meant)))
    if cap is not None and route.limits:
        edits += _cap(body, peeked, route, cap, host)
    if route.name == "chat" and peeked.stream and not peeked.asks_usage:
        edits.append(put_usage(body, peeked))
    return edits


def _cap(body: bytes, peeked: Peek, route: Route, cap: int, host: str) -> list[Edit]:
    """Return what brings every bound of the output down to the cap, or puts one in."""
    if len(route.limits) == 1 and peeked.output_limit is not None and peeked.output_limit <= cap:
        return []  # nearly always
    given = [key for key in route.limits if key in peeked.members]
    bounds = {key: body[slice(*peeked.members[key])] for key in given}
    edits = [put(peeked, key, b"%d" % cap) for key, text in bounds.items() if text != b"null" and int(text) > cap]
    if all(text == b"null" for text in bounds.values()):
        own = host.endswith(_OPENAI_OWN) and "max_completion_tokens" in route.limits
        key = given[0] if given else "max_completion_tokens" if own else route.limits[0]
        edits.append(put(peeked, key, b"%d" % cap))
    return edits


def _not_allowed(model: str, access: Access) -> Refusal:
    words = f"the model {model[:100]!r} is not allowed here (llm.models); allowed: {access.describe()[:500]}"
    return Refusal(403, NO_MODEL, words, again=False)
