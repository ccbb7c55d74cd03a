"""A run's models as its plan shows them: providers by address and key reference, models, limits. Pure.

Never a key, and not the placeholder that opens the way to them either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from cloister.policy.model import Llm, Provider

_PUBLIC = {"anthropic": "https://api.anthropic.com", "openai": "https://api.openai.com"}
_LIMITS = (
    "requests_per_minute", "concurrency", "max_tokens", "tokens_per_minute", "tokens_per_run", "tokens_per_day",
    "tokens_per_month", "cost_per_minute_usd", "cost_per_run_usd", "cost_per_day_usd", "cost_per_month_usd",
)  # fmt: skip


def planned_models(llm: Llm, providers: Mapping[str, Provider], variables: Iterable[str]) -> tuple[str, ...]:
    """Return the lines of a plan about models; none without a provider. `variables` hold the placeholder."""
    if not llm.providers:
        return ()
    return (*_lines(llm, providers), f"placeholder in {', '.join(variables)}")


def _lines(llm: Llm, providers: Mapping[str, Provider]) -> Iterator[str]:
    for name in llm.providers:
        if name in providers:
            one = providers[name]
            address = one.base_url or _PUBLIC[one.protocol.partition("-")[0]]
            yield f"{name}: {one.protocol} at {address}; key {one.key or 'none'}"
    yield f"models: {', '.join(llm.models) or 'all of these providers'}"
    if llm.aliases:
        yield f"aliases: {', '.join(f'{name} is {model}' for name, model in llm.aliases.items())}"
    limits = [f"{name} {_number(value)}" for name in _LIMITS if (value := getattr(llm, name)) is not None]
    if llm.requests_per_minute is None:
        limits.insert(0, "requests_per_minute 60")
    yield f"limits: {', '.join(limits)}"
    switches = [name for name in ("fallback", "redact", "redact_secrets", "record") if getattr(llm, name)]
    if llm.on_exhausted == "ask":
        switches.append("a used-up budget is asked about")
    if switches:
        yield f"also: {', '.join(switches)}"


def _number(value: float) -> str:
    """Return a number as a policy has it, without an exponent."""
    return f"{value:.10g}"
