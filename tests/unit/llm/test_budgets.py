"""Budgets: reserved before, settled after, and what a refusal says."""

from __future__ import annotations

import calendar
from collections.abc import Callable

import pytest

from cloister.llm.budgets import Account, Hold, compile_limits
from cloister.llm.errors import Refusal
from cloister.llm.ledger import Spent
from cloister.policy.model import Llm

NOON = float(calendar.timegm((2026, 1, 31, 12, 0, 0)))
DAY = 86_400.0


NOTHING = Spent()


def account(spent: Spent = NOTHING, **llm) -> Account:
    """Return an account; the books know the same of every span but the last minute."""
    return Account(compile_limits(Llm(**llm)), books(lambda _since: spent))


def books(known: Callable[[float], Spent]):
    """Return a loader that knows something of every span but the last minute."""
    return lambda since, until, _run: known(since) if until - since > 100 else NOTHING


def reserve(  # noqa: PLR0913 - a call in numbers
    one: Account, tokens: int = 10, cost: float = 0.0, now: float = NOON, tick: float = 0.0, run: str = "r"
):
    """Reserve."""
    return one.reserve(run, tokens, cost, now, tick)


def test_sixty_requests_a_minute_by_default():
    """C48: without a word in the policy, request 61 is refused until the first is a minute old."""
    one = account()
    for index in range(60):
        one.settle(reserve(one, tick=index * 0.1), 1, 0, index * 0.1)
    refused = reserve(one, tick=7.0)
    assert (refused.status, refused.reason, refused.retry_after_s) == (429, "requests-per-minute", 53)
    assert isinstance(reserve(one, tick=60.05), Hold)
    assert isinstance(reserve(one, tick=60.05), Refusal)


def test_calls_under_way_are_counted():
    """`concurrency` frees with the end of a call, settled or released."""
    one = account(concurrency=2)
    first, second = reserve(one), reserve(one)
    assert reserve(one).reason == "concurrency"
    one.settle(first, 1, 0, 0)
    third = reserve(one)
    assert isinstance(third, Hold)
    one.release(second)
    assert isinstance(reserve(one), Hold)


@pytest.mark.parametrize("span", ["minute", "run", "day", "month"])
@pytest.mark.parametrize("measure", ["tokens", "cost"])
def test_every_limit_holds_and_names_itself(span, measure):
    """What is reserved counts as used; what a call did not use is free again."""
    key = f"tokens_per_{span}" if measure == "tokens" else f"cost_per_{span}_usd"
    one = account(**{key: 100})
    amount = {"tokens": 60} if measure == "tokens" else {"tokens": 0, "cost": 60.0}
    first = reserve(one, **amount)
    refused = reserve(one, **amount)
    assert refused.reason == f"{measure}-per-{span}"
    assert refused.status == 429
    assert refused.retry_after_s >= 1
    one.settle(first, 30, 30.0, 0)
    assert isinstance(reserve(one, **amount), Hold)


def test_a_call_may_pass_its_own_reservation_only():
    """What it really used counts, however much; then nothing more is allowed."""
    one = account(tokens_per_day=100)
    one.settle(reserve(one, 50), 170, 0, 0)
    assert reserve(one, 1).reason == "tokens-per-day"


def test_settling_twice_changes_nothing():
    """Exactly once, whatever the order of endings."""
    one = account(tokens_per_day=100)
    hold = reserve(one, 50)
    one.settle(hold, 40, 0, 0)
    one.settle(hold, 40, 0, 0)
    one.release(hold)
    assert isinstance(reserve(one, 60), Hold)
    assert isinstance(reserve(one, 1), Refusal)


def test_budgets_survive_a_restart():
    """What the books know of the day counts from the first call on."""
    one = account(Spent(tokens=95), tokens_per_day=100)
    assert reserve(one, 10).reason == "tokens-per-day"
    assert isinstance(reserve(one, 5), Hold)


def test_a_limit_that_comes_by_reload_counts_what_was_before_once():
    """Calls under way stand in the books with their reservation: they are not counted twice."""
    known = Spent()
    one = Account(compile_limits(Llm()), books(lambda _since: known))
    one.settle(reserve(one, 50), 30, 0, 0)
    held = reserve(one, 40)
    known = Spent(tokens=70)  # 30 that closed, 40 that are open
    one.limits = compile_limits(Llm(tokens_per_day=100))
    assert reserve(one, 31).reason == "tokens-per-day"
    one.settle(held, 0, 0, 0)
    assert isinstance(reserve(one, 70), Hold)
    assert isinstance(reserve(one, 1), Refusal)


def test_days_and_months_end_in_utc():
    """Midnight frees the day; the 1st frees the month; Retry-After points there."""
    one = account(tokens_per_day=100, tokens_per_month=150)
    one.settle(reserve(one, 100), 100, 0, 0)
    assert reserve(one, 60).retry_after_s == 12 * 3600
    assert reserve(one, 60, now=NOON - DAY).reason == "tokens-per-month"
    assert isinstance(reserve(one, 100, now=NOON + DAY / 2), Hold)


def test_a_clock_that_steps_back_gives_nothing_away():
    """Yesterday's budget is still used up when the clock returns to it."""
    spent = {}
    load = books(lambda since: Spent(tokens=spent.get(int(since // DAY), 0)))
    one = Account(compile_limits(Llm(tokens_per_day=100)), load)
    one.settle(reserve(one, 100), 100, 0, 0)
    spent[int(NOON // DAY)] = 100
    assert isinstance(reserve(one, 100, now=NOON + DAY), Hold)
    assert reserve(one, 1, now=NOON).reason == "tokens-per-day"


def test_a_call_over_midnight_counts_where_it_began():
    """Its reservation and its usage are of the same day."""
    one = account(tokens_per_day=100)
    hold = reserve(one, 100, now=NOON)
    later = reserve(one, 100, now=NOON + DAY)
    assert isinstance(later, Hold)
    one.settle(hold, 100, 0, 0)
    one.release(later)
    assert isinstance(reserve(one, 100, now=NOON + DAY), Hold)


def test_runs_of_one_agent_share_days_but_not_runs():
    """`tokens_per_run` is each run's own, `tokens_per_day` the agent's."""
    one = account(tokens_per_run=60, tokens_per_day=100)
    one.settle(reserve(one, 60, run="a"), 60, 0, 0)
    assert reserve(one, 1, run="a").reason == "tokens-per-run"
    assert isinstance(reserve(one, 40, run="b"), Hold)
    assert reserve(one, 10, run="c").reason == "tokens-per-day"


def test_clients_are_told_not_to_try_again_in_vain():
    """A minute passes; a day does not: SDKs obey x-should-retry."""
    assert reserve(account(tokens_per_day=5)).again is False
    one = account(tokens_per_minute=15)
    reserve(one)
    assert reserve(one).again is True
    assert reserve(one, 99).again is False


def test_alerts_come_once_for_each_share():
    """FINDINGS 2.4 no. 7: at 50, 80 and 100 %; a jump over two tells the higher one; a restart repeats none."""
    told = []
    one = account(tokens_per_day=100)
    one.listen("r", lambda alert: told.append((alert.reason, alert.percent)))
    for used in (49, 1, 40, 1, 9):
        one.settle(reserve(one, used), used, 0, 0)
    assert told == [("tokens-per-day", 50), ("tokens-per-day", 80), ("tokens-per-day", 100)]
    again = []
    two = account(Spent(tokens=85), tokens_per_day=100)
    two.listen("r", lambda alert: again.append(alert.percent))
    two.settle(reserve(two, 5), 5, 0, 0)
    assert again == []


def test_a_grant_gives_the_amount_once_more():
    """What a person allows is the limit again, in this span only."""
    one = account(tokens_per_day=100)
    one.settle(reserve(one, 100), 100, 0, 0)
    one.grant("r", "tokens-per-day", NOON)
    assert isinstance(reserve(one, 100), Hold)
    assert isinstance(reserve(one, 1), Refusal)


def test_a_blocked_agent_calls_nothing():
    """The kill switch stands before every other rule."""
    one = account()
    one.blocked = "by its owner"
    assert reserve(one).reason == "agent-blocked"
    one.blocked = ""
    assert isinstance(reserve(one), Hold)


def test_fractions_of_a_cent_add_up_exactly():
    """A million calls of a tenth of a cent are a thousand dollars, not more and not less."""
    one = account(cost_per_month_usd=0.3, requests_per_minute=10**9)
    for _ in range(3):
        one.settle(reserve(one, 0, 0.1), 0, 0.1, 0)
    assert isinstance(reserve(one, 0, 0.000000001), Refusal)
    assert isinstance(reserve(one, 0, 0.0), Hold)


def test_thousands_of_calls_a_second_are_remembered_in_little_memory():
    """Each counts for its whole minute and a quarter of a second more at most; what is kept does not grow with them."""
    one = account(tokens_per_minute=100_000, requests_per_minute=10**9)
    for number in range(50_000):
        one.settle(reserve(one, 1, tick=number / 2000), 2, 0, number / 2000)
    assert len(one._recent) < 4096 + 25 * 4 + 1
    assert reserve(one, 1, tick=25.0).reason == "tokens-per-minute"
    assert reserve(one, 40_002, tick=70.0).reason == "tokens-per-minute"  # those of the last 15 seconds: 30,000 x 2
    assert isinstance(reserve(one, 100_000, tick=85.3), Hold)


@pytest.mark.parametrize("seen", [600, 560])
def test_what_settles_while_the_books_are_asked_counts_once(seen):
    """The books have a call's reservation or its use, depending on the moment: never less is counted."""
    one = account(Spent(0, seen, 0.0))
    hold = reserve(one, 100)
    assert isinstance(hold, Hold)
    one.limits = compile_limits(Llm(requests_per_minute=1000, tokens_per_day=10_000))
    (question,) = one.unknown("run-1", NOON)
    spent = one.ask(question)
    one.settle(hold, 60, 0.0, 1.0)
    one.learn(question, spent, 2.0)
    one.learn(question, spent, 3.0)

    assert one.unknown("run-1", NOON) == []
    assert 560 <= one.shares()["day", "tokens"] * 10_000 <= 600


def test_an_account_that_knows_asks_nothing():
    """Every span once; a blocked agent's calls ask for none."""
    one = account(tokens_per_day=10, cost_per_month_usd=1.0, tokens_per_run=5)
    asked = one.unknown("run-1", NOON)
    assert [question.key[0] for question in asked] == ["minute", "run", "day", "month"]
    for question in asked:
        one.learn(question, one.ask(question), 0.0)
    assert one.unknown("run-1", NOON) == []
    assert [question.key for question in one.unknown("run-2", NOON)] == [("run", "run-2")]
    one.blocked = "no"
    assert one.unknown("run-3", NOON) == []


def test_what_is_known_is_known_for_its_day_run_and_limits():
    """The next day, another limit and a run that came again are asked for anew."""
    one = account(tokens_per_day=10, tokens_per_run=5)
    for question in one.unknown("r", NOON):
        one.learn(question, one.ask(question), 0.0)
    assert one.unknown("r", NOON) == one.unknown("r", NOON) == []
    one.limits = compile_limits(Llm(tokens_per_day=10, tokens_per_month=10))
    assert [question.key[0] for question in one.unknown("r", NOON)] == ["month"]
    assert [question.key[0] for question in one.unknown("r", NOON + DAY)] == ["day", "month"]
    assert [question.key[0] for question in one.unknown("r", NOON)] == ["day", "month"]  # the clock stepped back
    one.limits = compile_limits(Llm(tokens_per_run=5))
    one.unknown("r", NOON)
    one.forget_run("r")
    assert [question.key[0] for question in one.unknown("r", NOON)] == ["run"]
