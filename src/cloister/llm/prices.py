"""What a call costs: a list of prices per million tokens, and which of them a model's name stands for.

Prices are data (`prices.toml`), each with the day it was checked and its source; a user's own file comes first.
A name is looked up as the API spells it, then without what routers and clouds put around it: a provider's prefix,
a date, a version. Never by likeness: a model that is not listed has no price, because a budget in dollars that
guesses is none. Reading files and trusting them is for `runs/price_list.py`.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib import resources
from typing import Annotated

import msgspec

from cloister.errors import PolicyError, Problem
from cloister.llm.tokens import Usage
from cloister.policy.model import Protocol
from cloister.policy.table import Table

SCHEMA = 1
MILLION = 1_000_000

Dollars = Annotated[float, msgspec.Meta(ge=0, le=1_000_000)]
Day = Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d{2}-\d{2}$")]

_CONTEXT = re.compile(r"\[\d+[km]\]$")
"""Claude Code's mark for the long context window, `claude-sonnet-4-5[1m]`."""
_DATED = (re.compile(r"[-@]\d{8}$"), re.compile(r"-\d{4}-\d{2}-\d{2}$"), re.compile(r"-latest$"))
_BEDROCK = re.compile(r"^(?:([a-z]{2,6}(?:-gov)?)\.)?anthropic\.(claude-.+?)(?:-v\d+)?(?::\d+)?$")
"""Amazon's names: `us.anthropic.claude-opus-4-5-20251101-v1:0`; without a region they are one region's as well."""


class Rates(Table, frozen=True, kw_only=True):
    """Dollars per million tokens of each kind."""

    input: Dollars
    output: Dollars
    cache_read: Dollars | None = None
    cache_write: Dollars | None = None
    cache_write_1h: Dollars | None = None

    def cost(self, usage: Usage) -> float:
        """Return the dollars for one call; a rate that is not listed is the next dearer one that is."""
        read = self.input if self.cache_read is None else self.cache_read
        write = self.input if self.cache_write is None else self.cache_write
        write_1h = write if self.cache_write_1h is None else self.cache_write_1h
        return (
            usage.input_tokens * self.input
            + usage.cache_read_tokens * read
            + usage.cache_write_5m_tokens * write
            + usage.cache_write_1h_tokens * write_1h
            + usage.output_tokens * self.output
        ) / MILLION


class LongRates(Rates, frozen=True, kw_only=True):
    """The rates of a whole call whose prompt is longer than `above` tokens."""

    above: Annotated[int, msgspec.Meta(ge=1)]


class Entry(Rates, frozen=True, kw_only=True):
    """One `[[price]]`: the rates of one or more models."""

    models: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    """Names in lower case; `*` stands for any text, in a user's file."""
    date: Day = ""
    source: str = ""
    protocols: tuple[Protocol, ...] = ()
    """Only for providers that speak one of these; empty means all."""
    providers: tuple[str, ...] = ()
    """Only for these names of `[providers]`; empty means all. A local server's models may cost nothing."""
    regional: Annotated[float, msgspec.Meta(ge=1, le=10)] = 1.0
    long: LongRates | None = None


class _File(Table, frozen=True, kw_only=True):
    """A whole file of prices."""

    schema: int
    date: Day = ""
    price: tuple[Entry, ...] = ()


class Price(msgspec.Struct, frozen=True):
    """What one model costs."""

    entry: Entry
    label: str
    """What the ledger notes beside a cost: the day of the figures and the name that was found."""
    factor: float = 1.0

    def cost(self, usage: Usage) -> float:
        """Return the dollars for one call: what the upstream says it charges, else tokens times rates."""
        if usage.cost_usd is not None:
            return usage.cost_usd
        long = self.entry.long
        rates: Rates = self.entry
        if long is not None:
            prompt = usage.total - usage.output_tokens
            rates = long if prompt > long.above else rates
        return rates.cost(usage) * self.factor


class PriceList:
    """All prices; the first entry that fits is taken, so a user's own come first."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        """Index exact names; patterns are tried in their order."""
        self._entries = tuple(entries)
        self._found: dict[tuple[str, str, str], Price | None] = {}

    def find(self, protocol: str, model: str, provider: str = "") -> Price | None:
        """Return what a model costs at a provider that speaks a protocol, or None where nobody has said.

        Args:
            protocol: `anthropic`, `openai` or `openai-responses`.
            model: the name that the agent asked for, or the upstream answered with.
            provider: its name in `[providers]`, for a user's entries that are meant for one provider.
        """
        key = (protocol, model, provider)
        if key not in self._found:
            if len(self._found) >= _REMEMBERED:  # names come from agents: they are not kept without end
                self._found.clear()
            self._found[key] = self._find(protocol, model, provider)
        return self._found[key]

    def _find(self, protocol: str, model: str, provider: str) -> Price | None:
        for name, regional in _spellings(model):
            for entry in self._entries:
                if entry.protocols and protocol not in entry.protocols:
                    continue
                if entry.providers and provider not in entry.providers:
                    continue
                if any(fnmatchcase(name, one) if "*" in one else name == one for one in entry.models):
                    factor = entry.regional if regional else 1.0
                    mark = " regional" if factor != 1.0 else ""
                    return Price(entry, f"{entry.date} {name}{mark}".strip(), factor)
        return None


_REMEMBERED = 1024
_LONGEST_NAME = 256


def _spellings(model: str) -> list[tuple[str, bool]]:
    """Return the names to look for, the most exact first, each with whether a cloud's region stands before it."""
    name = _CONTEXT.sub("", model.strip().lower())
    if not name or len(name) > _LONGEST_NAME:
        return []
    found = [(name, False)]
    name = name.rpartition("/")[2]
    regional = False
    if bedrock := _BEDROCK.match(name):
        regional, name = bedrock[1] != "global", bedrock[2]
    if name.startswith("claude-"):
        name = name.replace(".", "-")  # OpenRouter's spelling: claude-sonnet-4.5
    found.append((name, regional))
    for dated in _DATED:
        name = dated.sub("", name)
    found.append((name, regional))
    return list(dict.fromkeys(found))


@functools.cache
def builtin_entries() -> tuple[Entry, ...]:
    """Return the prices that come with Cloister. Reads packaged data once, on the first call."""
    text = resources.files("cloister.llm").joinpath("prices.toml").read_text("utf-8")
    return parse_prices(text, "prices.toml")


def parse_prices(text: str, where: str) -> tuple[Entry, ...]:
    """Return the entries of a file of prices.

    Raises:
        PolicyError: it is not TOML, or not of this form; `prices-invalid`.
    """
    remedy = 'schema = 1, then tables such as: [[price]] models = ["name"], input = 3.0, output = 15.0'
    try:
        file = msgspec.convert(tomllib.loads(text), _File)
    except tomllib.TOMLDecodeError as error:
        raise PolicyError([Problem(f"not TOML: {error}", where, remedy)], reference="prices-invalid") from None
    except msgspec.ValidationError as error:
        raise PolicyError([Problem(str(error), where, remedy)], reference="prices-invalid") from None
    if file.schema != SCHEMA:
        raise PolicyError(
            [Problem(f"schema = {file.schema} is not known", where, "schema = 1")], reference="prices-invalid"
        )
    day = file.date
    return tuple(entry if entry.date else msgspec.structs.replace(entry, date=day) for entry in file.price)


def price_list(own: Sequence[Entry] = ()) -> PriceList:
    """Return a user's own prices, if any, followed by those that come with Cloister."""
    return PriceList((*own, *builtin_entries()))
