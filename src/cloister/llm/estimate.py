"""How many tokens a call may use at most, for the reservation that is made before it. Estimates, on the high side.

A byte-level tokenizer makes at most one token of a byte and, of prose and code, one of three to four bytes. Half the
bytes are reserved: more than real prompts need, and settled when the upstream tells the true number. Pictures cost by
their size in pixels, not bytes, so their base64 counts with a bound of its own.
"""

from __future__ import annotations

import re

from cloister.llm.peek import Peek
from cloister.llm.tokens import Usage

BYTES_PER_TOKEN = 2
PICTURE_TOKENS = 6_400
"""More than a picture costs with any provider (Anthropic: pixels / 750, at most about 4,800)."""
REMOTE_TOKENS = 50_000
"""For a file that the upstream fetches or holds, whose size is not known here."""
HELD_TOKENS = 200_000
"""For context that the upstream holds itself (`previous_response_id`)."""
DEFAULT_OUTPUT_TOKENS = 32_000
"""Where neither the request nor the policy nor the price list bounds the output."""

_LONG = re.compile(rb"(?<![A-Za-z0-9+/=_-])[A-Za-z0-9+/=_-]{4096,}+")
"""Looked for at the beginning of a run only: trying each of its bytes would take an agent's prompt for minutes."""
_REMOTE = re.compile(rb'"(?:file_id|file_url)"\s*:|"type"\s*:\s*"(?:url|file)"')
_PICTURE_LINK = re.compile(rb'"image_url"\s*:')
_SMALL = 8192


def input_tokens(body: bytes, peeked: Peek) -> int:
    """Return an upper estimate of a request's input tokens."""
    size, extra = len(body), 0
    if size >= _SMALL:
        for run in _LONG.finditer(body):
            near = body[max(0, run.start() - 256) : run.start()] + body[run.end() : run.end() + 256]
            if b"image/" in near:
                size -= run.end() - run.start()
                extra += min((run.end() - run.start()) // BYTES_PER_TOKEN, PICTURE_TOKENS)
    extra += REMOTE_TOKENS * len(_REMOTE.findall(body))
    extra += PICTURE_TOKENS * len(_PICTURE_LINK.findall(body))
    return size // BYTES_PER_TOKEN + extra + (HELD_TOKENS if peeked.continues else 0) + 1


def output_tokens(peeked: Peek, cap: int | None, most: int | None = None) -> int:
    """Return the most output tokens that a call can have.

    Args:
        peeked: what the request says.
        cap: the policy's `max_tokens`, which is written into the request.
        most: the most that the model can give, where it is known.
    """
    bounds = [bound for bound in (peeked.output_limit, cap, most) if bound is not None]
    return min(bounds or [DEFAULT_OUTPUT_TOKENS]) * peeked.choices


def usage(body: bytes, inputs: int, outputs: int) -> Usage:
    """Return the reservation as usage, in the dearest kind of token it may turn out to be.

    What a request marks for the cache may be billed as written to it: 1.25 times the input's price for five minutes,
    twice for an hour.
    """
    if b'"cache_control"' not in body:
        return Usage(input_tokens=inputs, output_tokens=outputs)
    if b'"1h"' in body:
        return Usage(cache_write_1h_tokens=inputs, output_tokens=outputs)
    return Usage(cache_write_5m_tokens=inputs, output_tokens=outputs)
