"""Bodies, streams and budgets of model calls against any input."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from cloister.llm import routes
from cloister.llm.budgets import Account, Hold, compile_limits
from cloister.llm.ledger import Spent
from cloister.llm.peek import BodyError, members, peek, put, splice
from cloister.llm.usage import Meter
from cloister.policy.model import Llm

CHAT = routes.find("POST", b"/v1/chat/completions")
NAMES = st.sampled_from(["model", "stream", "max_tokens", "n", "stream_options", "x", "Model", "méthode", ""])
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | TEXT, inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(NAMES | TEXT, JSON, max_size=8)
SPACE = st.text(" \t\n\r", max_size=3)


@st.composite
def spelled(draw: st.DrawFn) -> tuple[dict, bytes]:
    """Return an object and one of its spellings: any spacing, escapes or none."""
    value = draw(OBJECTS)
    spaces = [draw(SPACE) for _ in range(5)]
    parts = [
        f"{spaces[0]}{json.dumps(key, ensure_ascii=draw(st.booleans()))}{spaces[1]}:{spaces[2]}"
        f"{json.dumps(one, ensure_ascii=draw(st.booleans()))}{spaces[3]}"
        for key, one in value.items()
    ]
    return value, f"{spaces[4]}{{{','.join(parts)}{spaces[0]}}}{spaces[1]}".encode()


@given(spelled())
def test_members_are_those_of_the_standard_reader(pair: tuple[dict, bytes]) -> None:
    """Every member is found at its place, and nothing else is."""
    value, text = pair
    _, found = members(text)
    assert {name: json.loads(text[slice(*place)]) for name, place in found.items()} == value


@given(spelled(), NAMES, JSON)
def test_a_change_leaves_all_else_byte_for_byte(pair: tuple[dict, bytes], name: str, new: object) -> None:
    """After a splice the standard reader sees one value changed, and the bytes around it are the same."""
    value, text = pair
    try:
        found = peek(text, CHAT)
    except BodyError:
        return
    if name in {"méthode", ""}:
        return
    data = json.dumps(new).encode()
    edit = put(found, name, data)
    changed = splice(text, [edit])
    assert json.loads(changed) == {**value, name: new}
    assert changed == text[: edit.start] + edit.data + text[edit.end :]


@given(st.binary(max_size=200) | TEXT.map(str.encode))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    """No other exception, and what is read is what the standard reader reads."""
    try:
        found = peek(data, CHAT)
    except BodyError:
        return
    assert json.loads(data)["model"] == found.model


@given(OBJECTS.filter(bool), st.data())
def test_a_key_twice_is_refused(value: dict, data: st.DataObject) -> None:
    """Wherever the second one stands, and whatever value it has."""
    pairs = [(json.dumps(key), json.dumps(one)) for key, one in value.items()]
    twice = data.draw(st.sampled_from(pairs))
    pairs.insert(data.draw(st.integers(0, len(pairs))), (twice[0], data.draw(st.sampled_from(["1", twice[1], '"x"']))))
    text = ("{" + ",".join(f"{key}:{one}" for key, one in pairs) + "}").encode()
    with pytest.raises(BodyError, match="twice"):
        members(text)


EVENTS = st.lists(
    st.sampled_from(
        [
            b'data: {"message":{"model":"m","usage":{"input_tokens":5,"output_tokens":1}}}\n\n',
            b'event: x\r\ndata: {"usage":{"output_tokens":7}}\r\n\r\n',
            b": comment\n\n",
            b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":3}}\n\n',
            b"data: [DONE]\n\n",
            b'data: {"usage":\ndata: {"output_tokens":9}}\n\n',
            b'data: not json "usage"\n\n',
            b'data: {"type":"message_stop"}\n\n',
            b"half an event",
        ]
    ),
    max_size=8,
)


@given(EVENTS, st.lists(st.integers(1, 40), max_size=30), st.sampled_from(["anthropic", "chat", "responses"]))
def test_the_division_into_pieces_does_not_matter(parts: list[bytes], sizes: list[int], shape: str) -> None:
    """A stream in one piece, byte by byte, or cut anywhere gives the same usage."""
    whole = b"".join(parts)
    one, every, some = (Meter(shape, stream=True) for _ in range(3))
    one.feed(whole)
    for index in range(len(whole)):
        every.feed(whole[index : index + 1])
    position = 0
    for size in [*sizes, len(whole)]:
        if whole[position : position + size]:
            some.feed(whole[position : position + size])
        position += size
    results = [meter.finish() for meter in (one, every, some)]
    assert results[0] == results[1] == results[2]
    assert one.finished == every.finished == some.finished


class Budgets(RuleBasedStateMachine):
    """Any order of parallel calls, aborts, retries and missing usage."""

    holds = Bundle("holds")

    def __init__(self) -> None:
        super().__init__()
        self.limit = 1000
        self.used: dict[int, int] = {}
        self.excess: dict[int, int] = {}
        self.open: dict[int, tuple[int, int]] = {}
        self.kept: list[Hold] = []  # so that no id is given twice
        self.now, self.tick = 1_700_000_000.0, 0.0
        llm = Llm(tokens_per_day=self.limit, requests_per_minute=10**6)
        self.account = Account(compile_limits(llm), self._books)

    def _books(self, since: float, until: float, run: str) -> Spent:
        """Know what a ledger would: closed calls, and open ones with their reservation."""
        if until - since < 100 or run:
            return Spent()
        day = int(since // 86_400)
        return Spent(tokens=self.used.get(day, 0) + sum(size for at, size in self.open.values() if at == day))

    @rule(target=holds, tokens=st.integers(0, 600), run=st.sampled_from("ab"))
    def reserve(self, tokens: int, run: str) -> Hold | None:
        """A call begins; it is let in exactly when there is room for the whole of it."""
        day = int(self.now // 86_400)
        held = sum(size for at, size in self.open.values() if at == day)
        room = self.limit - self.used.get(day, 0) - held
        hold = self.account.reserve(run, tokens, 0.0, self.now, self.tick)
        assert isinstance(hold, Hold) == (tokens <= room)
        if not isinstance(hold, Hold):
            return None
        self.kept.append(hold)
        self.open[id(hold)] = (day, tokens)
        return hold

    @rule(hold=consumes(holds), share=st.floats(0, 1), beyond=st.booleans())
    def settle(self, hold: Hold | None, share: float, beyond: bool) -> None:
        """A call ends, having used less than it reserved, or (an estimate was wrong) more."""
        if id(hold) not in self.open:
            return  # refused, or of a process that is gone
        day, reserved = self.open.pop(id(hold))
        used = int(reserved * share) + (reserved + 5 if beyond else 0)
        self.account.settle(hold, used, 0.0, self.tick)
        self.account.settle(hold, used, 0.0, self.tick)
        self.used[day] = self.used.get(day, 0) + used
        self.excess[day] = self.excess.get(day, 0) + max(0, used - reserved)

    @rule(hold=consumes(holds))
    def abort(self, hold: Hold | None) -> None:
        """A call is taken back before it left."""
        if id(hold) in self.open:
            self.open.pop(id(hold))
            self.account.release(hold)

    @rule(step=st.sampled_from([1.0, 61.0, 40_000.0, -40_000.0]))
    def time_passes(self, step: float) -> None:
        """Clocks go on; the wall clock may step back."""
        self.now += step
        self.tick += abs(step)

    @rule()
    def restart(self) -> None:
        """The process begins anew with what the books know; calls under way are rows with their reservation."""
        for day, size in self.open.values():
            self.used[day] = self.used.get(day, 0) + size
        self.open = {}
        self.account = Account(self.account.limits, self._books)

    @invariant()
    def nothing_is_overspent(self) -> None:
        """Used and reserved never pass the limit but by what calls used beyond their own reservation."""
        for day, used in self.used.items():
            held = sum(size for at, size in self.open.values() if at == day)
            assert used + held <= self.limit + self.excess.get(day, 0)


TestBudgets = Budgets.TestCase
TestBudgets.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
