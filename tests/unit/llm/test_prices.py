"""Prices: every listed model costs what its source says, and what is not listed costs nothing we would guess."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import PolicyError
from cloister.llm.prices import Entry, builtin_entries, parse_prices, price_list
from cloister.llm.tokens import Usage

MILLION = 1_000_000
counts = st.integers(0, 10**7)
usages = st.builds(
    Usage,
    input_tokens=counts,
    cache_read_tokens=counts,
    cache_write_5m_tokens=counts,
    cache_write_1h_tokens=counts,
    output_tokens=counts,
)
listed = st.sampled_from([name for entry in builtin_entries() for name in entry.models])


@pytest.mark.parametrize("entry", builtin_entries(), ids=lambda entry: entry.models[0])
def test_every_entry_has_a_day_and_a_source(entry: Entry) -> None:
    """Each price says when it was checked and where it stands; names are spelled as they are looked up."""
    assert entry.date >= "2026-01-01"
    assert entry.source.startswith("https://")
    assert all(name == name.lower() for name in entry.models)


def test_no_model_is_listed_twice() -> None:
    """A name stands for one price."""
    names = [name for entry in builtin_entries() for name in entry.models]
    assert len(names) == len(set(names))


def test_anthropic_caches_cost_what_the_source_says() -> None:
    """Writes for 5 minutes cost 1.25 times the input, for 1 hour twice; reads a tenth, or what the source says."""
    less = {"claude-fable-5-1": 0.025, "claude-opus-5-5": 0.05, "claude-sonnet-5-5": 0.05}
    for entry in builtin_entries():
        if entry.models[0].startswith("claude"):
            assert entry.cache_write == pytest.approx(1.25 * entry.input)
            assert entry.cache_write_1h == pytest.approx(2 * entry.input)
            assert entry.cache_read == pytest.approx(less.get(entry.models[0], 0.1) * entry.input)


def test_an_hour_of_cache_is_not_priced_as_five_minutes() -> None:
    """A million tokens of Claude Opus 4.5, by kind, cost 5, 0.50, 6.25, 10 and 25 dollars."""
    price = price_list().find("anthropic", "claude-opus-4-5-20251101")
    assert price is not None
    each = [
        Usage(input_tokens=MILLION),
        Usage(cache_read_tokens=MILLION),
        Usage(cache_write_5m_tokens=MILLION),
        Usage(cache_write_1h_tokens=MILLION),
        Usage(output_tokens=MILLION),
    ]
    assert [price.cost(usage) for usage in each] == pytest.approx([5, 0.5, 6.25, 10, 25])


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("claude-opus-4-5-20251101", "claude-opus-4-5"),
        ("claude-sonnet-4-5[1m]", "claude-sonnet-4-5"),
        ("anthropic/claude-sonnet-4.5", "claude-sonnet-4-5"),
        ("claude-haiku-4-5@20251001", "claude-haiku-4-5"),
        ("publishers/anthropic/models/claude-opus-5", "claude-opus-5"),
        ("global.anthropic.claude-sonnet-4-5-20250929-v1:0", "claude-sonnet-4-5"),
        ("openai/gpt-5.4-2026-03-05", "gpt-5.4"),
        ("gpt-4o-2024-08-06", "gpt-4o"),
        ("gpt-4o-2024-05-13", "gpt-4o-2024-05-13"),
        ("Claude-3-5-Haiku-latest", "claude-3-5-haiku"),
    ],
)
def test_names_are_found_as_routers_and_clouds_spell_them(spelling: str, name: str) -> None:
    """A date, a provider's prefix and a version do not hide a model; a dated model with its own price keeps it."""
    price = price_list().find("anthropic", spelling)
    assert price is not None
    assert name in price.entry.models
    assert price.label == f"{price.entry.date} {name}"


@pytest.mark.parametrize(
    "unknown", ["", "gpt-9", "claude", "claude-opus", "claude-opus-4-55", "gpt-5.4-mini-turbo", "o", "x" * 4000, "*"]
)
def test_what_is_not_listed_has_no_price(unknown: str) -> None:
    """A name that only resembles a listed one has no price, however long or odd it is."""
    assert price_list().find("anthropic", unknown) is None


def test_a_regional_name_costs_the_factor_its_entry_names() -> None:
    """Amazon's regional profiles cost a tenth more, the global one the list price; the label says which it was."""
    prices = price_list()
    here = prices.find("anthropic", "eu.anthropic.claude-opus-4-6-v1:0")
    everywhere = prices.find("anthropic", "global.anthropic.claude-opus-4-6-v1:0")
    assert here is not None
    assert everywhere is not None
    usage = Usage(input_tokens=MILLION, output_tokens=MILLION)
    assert here.cost(usage) == pytest.approx(1.1 * everywhere.cost(usage))
    assert here.label.endswith(" regional")


@pytest.mark.parametrize(("model", "above"), [("claude-haiku-5-5", 100_000), ("gpt-5.4", 272_000)])
def test_a_long_prompt_makes_the_whole_call_dearer(model: str, above: int) -> None:
    """Up to the limit the short rates hold, one token above the long ones do, output included; cached tokens count."""
    price = price_list().find("openai", model)
    assert price is not None
    assert price.entry.long is not None
    short = Usage(input_tokens=above // 2, cache_read_tokens=above - above // 2, output_tokens=10**6)
    long = Usage(input_tokens=above // 2, cache_read_tokens=above - above // 2 + 1, output_tokens=10**6)
    assert price.cost(short) < price.entry.output * 1.2
    assert price.cost(long) > price.entry.long.output


@given(listed, usages)
def test_costs_are_never_negative_and_grow_with_every_token(model: str, usage: Usage) -> None:
    """One token more of any kind never costs less."""
    price = price_list().find("openai", model)
    assert price is not None
    cost = price.cost(usage)
    assert cost >= 0
    for kind in (
        "input_tokens",
        "cache_read_tokens",
        "cache_write_5m_tokens",
        "cache_write_1h_tokens",
        "output_tokens",
    ):
        more = {**{name: getattr(usage, name) for name in usage.__struct_fields__}, kind: getattr(usage, kind) + 1}
        assert price.cost(Usage(**more)) >= cost


@given(usages, usages)
def test_short_calls_add_up(one: Usage, other: Usage) -> None:
    """Without a long-context tier, the cost of two calls is that of their tokens together."""
    price = price_list().find("anthropic", "claude-opus-5")
    assert price is not None
    both = Usage(
        **{name: getattr(one, name) + getattr(other, name) for name in one.__struct_fields__ if name != "cost_usd"}
    )
    assert price.cost(both) == pytest.approx(price.cost(one) + price.cost(other))


def test_what_the_upstream_charges_wins() -> None:
    """Where the answer tells its cost, nothing is multiplied."""
    price = price_list().find("openai", "openai/gpt-5")
    assert price is not None
    assert price.cost(Usage(input_tokens=MILLION, cost_usd=0.25)) == 0.25


def test_a_users_entries_come_first() -> None:
    """An own price takes the place of ours, for the providers and protocols it names only; patterns work there."""
    own = parse_prices(
        """
        schema = 1
        date = "2026-11-01"
        [[price]]
        models = ["claude-opus-5"]
        protocols = ["anthropic"]
        input = 1
        output = 2
        [[price]]
        models = ["*"]
        providers = ["ollama"]
        input = 0
        output = 0
        """,
        "own",
    )
    prices = price_list(own)
    usage = Usage(input_tokens=MILLION)
    assert prices.find("anthropic", "claude-opus-5").cost(usage) == 1  # type: ignore[union-attr]
    assert prices.find("openai", "claude-opus-5").cost(usage) == 5  # type: ignore[union-attr]
    assert prices.find("openai", "llama-9", "ollama").cost(usage) == 0  # type: ignore[union-attr]
    assert prices.find("openai", "llama-9", "other") is None
    assert prices.find("anthropic", "claude-opus-5").label == "2026-11-01 claude-opus-5"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text",
    [
        "schema =",
        "schema = 2",
        "price = []",
        "schema = 1\n[[price]]\nmodels = []\ninput = 1\noutput = 1",
        "schema = 1\n[[price]]\nmodels = ['a']\ninput = -1\noutput = 1",
        "schema = 1\n[[price]]\nmodels = ['a']\ninput = nan\noutput = 1",
        "schema = 1\n[[price]]\nmodels = ['a']\ninput = inf\noutput = 1",
        "schema = 1\n[[price]]\nmodels = ['a']\ninput = 1",
        "schema = 1\n[[price]]\nmodels = ['a']\ninput = 1\noutput = 1\nouput = 1",
        "schema = 1\n[[price]]\nmodels = ['a']\ninput = 1\noutput = 1\ndate = 'May'",
    ],
)
def test_a_wrong_file_is_refused(text: str) -> None:
    """Negative, infinite, missing or misspelt figures are an error that names the file, never a price of nothing."""
    with pytest.raises(PolicyError) as caught:
        parse_prices(text, "/home/ann/.config/cloister/prices.toml")
    assert caught.value.reference == "prices-invalid"
    assert caught.value.where == "/home/ann/.config/cloister/prices.toml"
