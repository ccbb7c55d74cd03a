"""What one call used, counted in disjoint kinds of tokens, whatever the upstream counts together."""

from __future__ import annotations

import msgspec


class Usage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Tokens of one call. Every token is in exactly one field but `reasoning_tokens`, which are part of the output."""

    input_tokens: int = 0
    """Neither read from nor written to a cache."""
    cache_read_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    cost_usd: float | None = None
    """What the upstream says it charges, where it says so (OpenRouter)."""

    @property
    def total(self) -> int:
        """All tokens that count against a budget of tokens."""
        cached = self.cache_read_tokens + self.cache_write_5m_tokens + self.cache_write_1h_tokens
        return self.input_tokens + cached + self.output_tokens


def add(one: Usage, other: Usage) -> Usage:
    """Return what two calls used together; what an upstream said one of them costs is not kept."""
    return Usage(
        input_tokens=one.input_tokens + other.input_tokens,
        cache_read_tokens=one.cache_read_tokens + other.cache_read_tokens,
        cache_write_5m_tokens=one.cache_write_5m_tokens + other.cache_write_5m_tokens,
        cache_write_1h_tokens=one.cache_write_1h_tokens + other.cache_write_1h_tokens,
        output_tokens=one.output_tokens + other.output_tokens,
        reasoning_tokens=one.reasoning_tokens + other.reasoning_tokens,
    )
