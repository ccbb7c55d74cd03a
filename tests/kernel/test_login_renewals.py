"""The owner of logins in one broker: renewals beside the traffic, after refusals, and when the clock steps."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from cloister.errors import CloisterError, DeniedError, RetryError, UsageError, render
from cloister.host.logins import Shelf
from cloister.runs.logins import LoginEvent, Logins
from support.fake_oauth import Answer, FakeOauth
from support.kept_logins import make, stored

pytestmark = pytest.mark.kernel


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The directory of the store."""
    return tmp_path / "logins"


def test_the_broker_renews_beside_the_traffic(directory: Path, provider: FakeOauth) -> None:
    """While a token is due and good it is used; the next call has the new one, and one renewal was asked for."""
    kept = make(directory, provider, age_s=3500)
    events: list[LoginEvent] = []
    provider.on_token = lambda: time.sleep(0.2)

    async def main() -> list[str]:
        owner = Logins(str(directory), record=events.append)
        first = await asyncio.gather(*(owner.access_token("test") for _ in range(50)))
        await owner.close()
        return [*dict.fromkeys(first), await owner.access_token("test")]

    used = asyncio.run(main())

    assert used[0] == kept.access_token
    assert used[-1] == stored(directory).access_token != kept.access_token
    assert provider.renewals() == 1
    assert [event.what for event in events] == ["renewed"]


def test_an_expired_token_makes_everybody_wait_for_one_renewal(directory: Path, provider: FakeOauth) -> None:
    """Fifty callers, one request; a caller that goes away does not take the renewal with it."""
    make(directory, provider, age_s=4000)
    provider.on_token = lambda: time.sleep(0.2)

    async def main() -> set[str]:
        owner = Logins(str(directory))
        impatient = asyncio.create_task(owner.access_token("test"))
        await asyncio.sleep(0.05)
        impatient.cancel()
        return set(await asyncio.gather(*(owner.access_token("test") for _ in range(50))))

    assert asyncio.run(main()) == {stored(directory).access_token}
    assert provider.renewals() == 1


def test_two_brokers_share_a_login(directory: Path, provider: FakeOauth) -> None:
    """Each has its own memory and both have the file: one renews, the other reads what it wrote."""
    make(directory, provider, age_s=4000)

    async def main() -> set[str]:
        owners = [Logins(str(directory)) for _ in range(3)]
        return set(await asyncio.gather(*(owner.access_token("test") for owner in owners)))

    assert asyncio.run(main()) == {stored(directory).access_token}
    assert provider.renewals() == 1


def test_a_refused_token_is_renewed_once(directory: Path, provider: FakeOauth) -> None:
    """After a 401 there is one renewal; when the new token is refused as well, no more are asked for."""
    kept = make(directory, provider)

    async def main() -> None:
        owner = Logins(str(directory))
        tries = await asyncio.gather(*(owner.renew("test", kept.access_token) for _ in range(20)))
        assert set(tries) == {stored(directory).access_token}
        for _ in range(20):
            assert await owner.renew("test", tries[0]) == tries[0]

    asyncio.run(main())

    assert provider.renewals() == 1


def test_whoever_asks_after_a_refusal_waits_for_the_new_token(directory: Path, provider: FakeOauth) -> None:
    """While a refused token is being renewed nobody gets it again; when the login has ended, that is what they hear."""
    kept = make(directory, provider)
    provider.on_token = lambda: time.sleep(0.2)

    async def main() -> None:
        owner = Logins(str(directory))
        owner.refused("test", "another token")
        assert await owner.access_token("test") == kept.access_token
        owner.refused("test", kept.access_token)
        fresh = await owner.access_token("test")
        assert fresh == stored(directory).access_token != kept.access_token
        owner.refused("test", fresh)
        assert await owner.access_token("test") == fresh

    asyncio.run(main())
    assert provider.renewals() == 1


def test_a_refused_token_of_an_ended_login_is_told_as_such(directory: Path, provider: FakeOauth) -> None:
    """Not an empty token, and not the old one."""
    kept = make(directory, provider)
    provider.families[0].ended = True

    async def main() -> None:
        owner = Logins(str(directory))
        owner.refused("test", kept.access_token)
        with pytest.raises(DeniedError, match="has ended"):
            await owner.access_token("test")

    asyncio.run(main())


def test_trouble_is_asked_again_with_pauses_and_not_before(directory: Path, provider: FakeOauth) -> None:
    """While the token is good it is used; without one the reason is told at once, and nobody storms the provider."""
    make(directory, provider, age_s=3500)
    provider.trouble = [Answer(503, b"{}") for _ in range(500)]
    clock = [time.time(), 0.0]
    owner = Logins(str(directory), now=lambda: clock[0], monotonic=lambda: clock[1])

    async def main() -> None:
        for _ in range(60):
            assert await owner.access_token("test")
            await owner.close()
        assert provider.renewals() == 1
        for _ in range(60):
            clock[0] += 1
            clock[1] += 1
            assert await owner.access_token("test")
            await owner.close()
        assert 4 <= provider.renewals() <= 8
        clock[0] += 1000
        clock[1] += 1000
        for _ in range(50):
            with pytest.raises(RetryError, match="in trouble"):
                await owner.access_token("test")
        assert provider.renewals() <= 10
        provider.trouble.clear()
        clock[0] += 1000
        clock[1] += 1000
        assert provider.is_good(await owner.access_token("test"))

    asyncio.run(main())


def test_an_ended_login_is_told_to_all_and_asked_about_once(directory: Path, provider: FakeOauth) -> None:
    """invalid_grant: one request, one event, the same clear error for every user of it; a new login mends it."""
    make(directory, provider, age_s=4000)
    provider.families[0].ended = True
    events: list[LoginEvent] = []

    async def main() -> None:
        owner = Logins(str(directory), record=events.append)
        for _ in range(20):
            with pytest.raises(DeniedError, match="has ended") as caught:
                await owner.access_token("test")
            assert caught.value.reference == "login-expired"
            assert caught.value.remedy == "cloister login test"
        assert owner.describe("test").state == "ended"
        make(directory, provider)
        assert provider.is_good(await owner.access_token("test"))

    asyncio.run(main())

    assert provider.renewals() == 1
    assert [event.what for event in events] == ["ended"]


def test_logging_out_counts_at_once(directory: Path, provider: FakeOauth) -> None:
    """An old handle fails at the next use, not when its token ends."""
    make(directory, provider)

    async def main() -> None:
        owner = Logins(str(directory))
        assert await owner.access_token("test")
        with Shelf(str(directory)).held("test") as held:
            assert held.remove()
            assert not held.remove()
        with pytest.raises(UsageError, match="no login"):
            await owner.access_token("test")

    asyncio.run(main())


@pytest.mark.parametrize("step_s", [-86400.0, -30.0, 600.0, 86400.0])
def test_clock_steps_cost_one_renewal_at_most(directory: Path, provider: FakeOauth, step_s: float) -> None:
    """Forwards or backwards: a good token is had, and never more than one renewal is asked for."""
    make(directory, provider)
    clock = [time.time(), 0.0]
    owner = Logins(str(directory), now=lambda: clock[0], monotonic=lambda: clock[1])

    async def main() -> None:
        assert await owner.access_token("test")
        clock[0] += step_s
        for _ in range(20):
            assert provider.is_good(await owner.access_token("test"))
            await owner.close()

    asyncio.run(main())

    assert provider.renewals() <= 1


def test_a_clock_set_back_does_not_make_a_token_live_longer(directory: Path, provider: FakeOauth) -> None:
    """What was good for an hour is over after one, whatever the clock on the wall says."""
    kept = make(directory, provider)
    clock = [time.time(), 0.0]
    owner = Logins(str(directory), now=lambda: clock[0], monotonic=lambda: clock[1])

    async def main() -> str:
        assert await owner.access_token("test") == kept.access_token
        clock[0] -= 100
        clock[1] += 3601
        return await owner.access_token("test")

    assert asyncio.run(main()) == stored(directory).access_token != kept.access_token
    assert provider.renewals() == 1


def test_nothing_of_a_login_shows_in_its_errors(directory: Path, provider: FakeOauth) -> None:
    """A broken file is told without being quoted."""
    kept = make(directory, provider)
    path = directory / "test.json"
    path.write_bytes(path.read_bytes()[:-20])

    with pytest.raises(CloisterError) as caught:
        stored(directory)

    assert kept.access_token not in render(caught.value) + repr(caught.value.__context__)
