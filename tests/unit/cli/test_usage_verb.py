"""`cloister usage`: sums are those of the rows, wherever they are, and the table fits the terminal."""

from __future__ import annotations

import csv
import io
import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.cli import output, usage
from cloister.errors import DeniedError, RetryError, UsageError
from cloister.llm.ledger import Row
from cloister.runs.usage import BYS, Line, Question, Usage, gather, sqlite_ledger
from support.books import MIDNIGHT, ended, noted, open_books, refusal


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without a policy; the books are in `state/cloister/ledger`."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(time, "time", lambda: MIDNIGHT + 86400 * 2.5)
    monkeypatch.delenv("COLUMNS", raising=False)
    return tmp_path / "state/cloister/ledger"


ROWS = [
    noted(1),
    noted(2, agent="pi", model="gpt-6.1-sol", provider="openai", run="run2"),
    noted(3, time=MIDNIGHT + 86400 + 3, cache_read_tokens=5000, cache_write_1h_tokens=70),
    noted(4, time=MIDNIGHT + 2 * 86400, user="bob", model="claude-haiku-5-5"),
]


def _fill(state: Path) -> list[Row]:
    """Write four calls and a refusal, and note a call that is under way."""
    books = open_books(state)
    for row in ROWS:
        books.opened(row)
        books.closed(ended(row, source="estimated" if row.agent == "pi" else "provider"))
    books.refused(refusal(8, time=MIDNIGHT + 8))
    books.opened(noted(9))
    assert books.drained(5)
    books.close()
    return ROWS


@pytest.mark.parametrize("by", BYS)
def test_every_way_to_add_up_gives_the_same_total(state: Path, capsys: pytest.CaptureFixture[str], by: str) -> None:
    """By whatever calls are told apart, lines add up to the total, which is that of the rows."""
    _fill(state)

    assert usage.main(["--by", by, "--since", "all", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    total = found["total"]
    assert (total["requests"], total["refused"], total["estimated"]) == (4, 1, 1)
    assert (total["input_tokens"], total["cache_read_tokens"], total["cache_write_tokens"]) == (400, 5000, 70)
    assert total["output_tokens"] == 80
    assert total["cost_usd"] == pytest.approx(0.004)
    assert total["estimated_usd"] == pytest.approx(0.001)
    assert (found["under_way"], found["under_way_usd"]) == (1, pytest.approx(0.0255))
    for name, value in total.items():
        if name not in {"last", "days_usd"}:
            assert sum(line[name] for line in found["lines"]) == pytest.approx(value)
    assert sum(total["days_usd"].values()) == pytest.approx(0.004)
    expected = {"agent": 2, "model": 3, "day": 3, "run": 2, "provider": 3, "user": 2}
    assert len(found["lines"]) == expected[by]


def test_rows_in_the_journal_count_like_those_in_the_ledger(state: Path) -> None:
    """Before the ledger has a row, and while it is in both, the answer is the same."""
    books = open_books(state)
    books._writer.stop(5)
    for row in ROWS:
        books.opened(row)
        books.closed(ended(row))
    books.refused(refusal(8))
    question = Question(by="model")
    before = gather(str(state), None, question)
    saved = [(path, path.read_bytes()) for path in state.glob("journal*")]
    books.close()
    again = open_books(state)
    assert again.drained(5)
    again.close()

    after = gather(str(state), sqlite_ledger(f"{state}/ledger.db"), question)
    for path, content in saved:
        path.write_bytes(content)
    both = gather(str(state), sqlite_ledger(f"{state}/ledger.db"), question)

    assert before == after == both
    assert after.total.requests == 4


@pytest.mark.parametrize(
    ("words", "requests"),
    [
        (["--since", "all"], 4),
        (["--since", "today"], 1),
        (["--since", "35h"], 1),
        (["--since", "2d"], 2),
        (["--since", "all", "--until", "35h"], 3),
        (["--agent", "pi"], 1),
        (["--agent", "nobody"], 0),
        (["--since", "month"], 4),
    ],
)
def test_time_and_agent_bound_what_is_counted(
    state: Path, capsys: pytest.CaptureFixture[str], words: list[str], requests: int
) -> None:
    """Lengths of time, words and agents select rows exactly."""
    _fill(state)
    usage.main([*words, "--json"])
    assert json.loads(capsys.readouterr().out)["total"]["requests"] == requests


def test_a_time_that_is_none_is_refused(state: Path) -> None:
    """A word that is no time is an error that shows the forms."""
    with pytest.raises(UsageError, match="2026-11-01"):
        usage.main(["--since", "yesteryear"])


def test_without_a_ledger_nothing_was_used(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is made where nothing was; the answer says so, and gives zeros to programs."""
    assert usage.main([]) == 0
    assert "no model calls" in capsys.readouterr().out
    assert usage.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["requests"] == 0
    assert not state.exists()


def test_a_broken_ledger_is_an_error_not_an_empty_table(state: Path) -> None:
    """What cannot be read is said, and left as it is."""
    state.mkdir(parents=True)
    (state / "ledger.db").write_bytes(b"no database" * 100)
    with pytest.raises(RetryError) as caught:
        usage.main([])
    assert caught.value.reference == "ledger-unreachable"
    assert (state / "ledger.db").read_bytes() == b"no database" * 100


def test_the_table_says_what_is_estimated_refused_and_under_way(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sums with estimates carry a mark, and the lines below explain it."""
    _fill(state)
    usage.main([])
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0].split() == ["AGENT", "CALLS", "INPUT", "CACHED", "WRITTEN", "OUTPUT", "COST", "PER", "DAY"]
    assert [line.split()[0] for line in lines[1:4]] == ["claude", "pi", "total"]
    assert "~$0.0010" in lines[2]
    assert "1 call has estimated usage: $0.0010 of the cost" in text
    assert "1 more was refused" in text
    assert "1 call has no end yet, at most $0.03, in no sum" in text
    assert "\x1b" not in text


def test_a_model_without_a_price_is_not_shown_as_free(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sums that lack an unknown price are marked as too small, with the reason below; without such calls, not."""
    books = open_books(state)
    books.opened(noted(1))
    books.closed(ended(noted(1)))
    assert books.drained(5)
    usage.main([])
    assert "≥" not in capsys.readouterr().out
    row = noted(2, model="llama-9", price="", cost_usd=0.0)
    books.opened(row)
    books.closed(ended(row, cost_usd=0.0))
    books.refused(refusal(3))
    assert books.drained(5)
    books.close()

    usage.main([])
    text = capsys.readouterr().out
    assert "≥$0.0010" in text
    assert "1 call is in no cost: no price is known for the model" in text
    usage.main(["--json"])
    assert json.loads(capsys.readouterr().out)["total"]["unpriced"] == 1


def test_csv_can_be_read_again_and_runs_nothing(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that is named like a formula, with commas and quotes in it, is text to a spreadsheet."""
    books = open_books(state)
    row = noted(1, model='=cmd|"/c calc",x')
    books.opened(row)
    books.closed(ended(row, model=row.model))
    assert books.drained(5)
    books.close()
    usage.main(["--by", "model", "--csv"])

    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["model"] for row in rows] == ['\'=cmd|"/c calc",x']
    assert rows[0]["requests"] == "1"


def test_names_that_agents_chose_do_not_reach_the_terminal_raw(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An escape sequence in the name of a model repaints nothing."""
    books = open_books(state)
    books.refused(refusal(1, model="\x1b[2Jgone"))
    assert books.drained(5)
    books.close()
    usage.main(["--by", "model"])
    assert "\x1b" not in capsys.readouterr().out


keys = st.text(max_size=40)
amounts = st.one_of(st.just(0.0), st.floats(0, 1e6))
counts = st.integers(0, 10**13)
some_lines = st.builds(
    Line,
    key=keys,
    requests=counts,
    estimated=st.integers(0, 3),
    unpriced=st.integers(0, 1),
    input_tokens=counts,
    cache_read_tokens=counts,
    cache_write_tokens=counts,
    output_tokens=counts,
    cost_usd=amounts,
    days=st.dictionaries(st.integers(20_000, 20_400), amounts, max_size=6),
)


@given(st.lists(some_lines, min_size=1, max_size=5), st.sampled_from(BYS), st.integers(72, 250))
def test_no_table_is_wider_than_its_terminal(lines: list[Line], by: str, width: int) -> None:
    """Whatever the numbers, the table fits; sparklines and columns go before digits do."""
    found = Usage(by=by, since=0.0, until=1.8e9, lines=lines, total=lines[0], under_way=0, under_way_usd=0.0)
    table = usage.render(found, width).split("\n\n")[0]
    assert all(output.cells(line) <= width for line in table.splitlines())
    assert len(table.splitlines()) == len(lines) + 2


@given(st.dictionaries(st.integers(0, 400), amounts, max_size=20), st.integers(1, 40))
def test_a_sparkline_has_a_bar_where_something_was_spent(days: dict[int, float], size: int) -> None:
    """Its width is bounded, a day without cost is blank, and the highest bar is full."""
    line = usage.spark(days, 0, 400, size)
    assert len(line) == size
    assert (line.strip() == "") == (not any(days.values()))
    assert "█" in line or not any(days.values())


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.0k"),
        (999_949, "999.9k"),
        (999_950, "1.0M"),
        (1_234_567, "1.2M"),
        (10**9, "1.0G"),
    ],
)
def test_tokens_are_short(number: int, text: str) -> None:
    """Thousands have their letter, and rounding never shows 1000.0k."""
    assert usage.count(number) == text


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0.0, "$0.00"), (0.00001, "<$0.0001"), (0.00123, "$0.0012"), (0.01, "$0.01"), (12345.678, "$12,345.68")],
)
def test_cents_are_not_lost(amount: float, text: str) -> None:
    """Small amounts show the digits that matter; a cost is never shown as nothing."""
    assert usage.dollars(amount) == text


def test_the_systems_ledger_is_roots(monkeypatch: pytest.MonkeyPatch, state: Path) -> None:
    """Somebody else than root is told where the own numbers are; nothing is read."""
    del state
    monkeypatch.setattr("os.geteuid", lambda: 4242)
    with pytest.raises(DeniedError) as caught:
        usage.main(["--system"])
    assert caught.value.reference == "root-needed"
    assert "cloister receipt" in caught.value.remedy
