"""A ledger that does not answer: requests that need it are held and then refused, everybody else is served."""

import asyncio
import threading
import time

import pytest
import uvloop

from cloister.errors import RetryError
from cloister.llm.ledger import Spent
from cloister.relay.llm.service import Bounds
from support.model_rig import MESSAGE, Rig, Script, vanish

pytestmark = pytest.mark.kernel
PATIENCE_S = 0.4


class Gate:
    """Stands before the books of a rig: shut, broken or open."""

    def __init__(self, rig: Rig) -> None:
        """Shut it."""
        self._through = rig.books.spent
        self.open = threading.Event()
        self.broken = False
        self.asked: list[float] = []
        rig.books.spent = self.spent  # type: ignore[method-assign]

    def spent(self, agent: str, since: float, until: float, run: str = "") -> Spent:
        """Wait, fail or answer; any thread."""
        self.asked.append(since)
        assert threading.current_thread() is not threading.main_thread()
        if self.broken:
            raise RetryError("ledger-unreachable", "what was spent cannot be known")
        self.open.wait(10)
        return self._through(agent, since, until, run)


def test_a_ledger_that_hangs_holds_up_its_own_request_only() -> None:
    """Others are answered meanwhile; the request itself gets 503 with a reason in time, and works when it is back."""

    async def test() -> None:
        async with (
            Script() as upstream,
            Rig(upstream.url, bounds=Bounds(books_s=PATIENCE_S), tokens_per_day=1000) as rig,
        ):
            gate = Gate(rig)
            began = time.monotonic()
            held = asyncio.create_task(rig.ask())
            await asyncio.sleep(0.05)
            other = await rig.ask(None, "/healthz", "GET")
            assert other.status == 200
            assert time.monotonic() - began < PATIENCE_S
            assert not held.done()
            reply = await held
            assert (reply.status, reply.fields["retry-after"]) == (503, "5")
            assert b"ledger does not answer" in reply.body
            assert PATIENCE_S <= time.monotonic() - began < PATIENCE_S + 2
            assert upstream.asked == []

            gate.open.set()
            assert (await rig.ask()).status == 200
            await rig.settled()

    uvloop.run(test())


def test_a_ledger_that_fails_refuses() -> None:
    """Nobody knows what is left, so nothing is sent; the next request asks again."""

    async def test() -> None:
        async with Script() as upstream, Rig(upstream.url, tokens_per_day=1000) as rig:
            gate = Gate(rig)
            gate.broken = True
            reply = await rig.ask()
            assert reply.status == 503
            assert b"what was spent cannot be known" in reply.body
            assert upstream.asked == []

            gate.broken = False
            gate.open.set()
            assert (await rig.ask()).status == 200
            await rig.settled()

    uvloop.run(test())


def test_requests_share_a_question_and_the_budget_holds() -> None:
    """Ten requests at once ask once for each span, and pass no limit when the answers come."""

    async def test() -> None:
        async with Script() as upstream, Rig(upstream.url, tokens_per_day=500, max_tokens=100) as rig:
            gate = Gate(rig)
            asked = [asyncio.create_task(rig.ask()) for _ in range(10)]
            await asyncio.sleep(0.1)
            gate.open.set()
            replies = await asyncio.gather(*asked)
            good = [one for one in replies if one.status == 200]
            assert 0 < len(good) < 10
            assert {one.status for one in replies} == {200, 429}
            assert len(gate.asked) == 2  # the minute and the day
            await rig.settled(len(good))

    uvloop.run(test())


def test_a_client_that_leaves_meanwhile_costs_nothing() -> None:
    """Nothing is sent for it when the answer comes."""

    async def test() -> None:
        async with Script() as upstream, Rig(upstream.url, tokens_per_day=1000) as rig:
            gate = Gate(rig)
            _, writer = await rig.connect()
            writer.write(rig.request(MESSAGE))
            await asyncio.sleep(0.1)
            vanish(writer)
            await asyncio.sleep(0.1)
            gate.open.set()
            await asyncio.sleep(0.1)
            assert upstream.asked == []
            assert rig.service.buffered == 0

    uvloop.run(test())
