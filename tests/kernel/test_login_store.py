"""Logins on a real file system, against a provider that keeps its rules: rotation, kill points, several processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.credentials import logins as kept_logins
from cloister.credentials.oauth_answers import read_token_answer
from cloister.errors import CloisterError, DeniedError, RetryError, StepError, UsageError, render
from cloister.host.logins import Shelf
from cloister.runs.login_files import load
from cloister.runs.login_renewal import RenewalError, Renewals, poster
from cloister.runs.logins import LoginEvent, Logins
from support.fake_oauth import Answer, FakeOauth

pytestmark = pytest.mark.kernel
SOURCE = Path(kept_logins.__file__).parents[2]


@pytest.fixture
def provider() -> Iterator[FakeOauth]:
    """A provider whose access tokens last an hour."""
    with FakeOauth() as provider:
        yield provider


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The directory of the store."""
    return tmp_path / "logins"


def make(directory: Path, provider: FakeOauth, *, age_s: float = 0.0, name: str = "test") -> kept_logins.Kept:
    """Store a login that was made some time ago."""
    now = time.time() - age_s
    granted = read_token_answer(200, json.dumps(provider.grant()).encode(), now)
    kept = kept_logins.new(name, "test", provider.login(), granted, now)
    with Shelf(str(directory)).held(name) as held:
        held.write(kept_logins.encode(kept))
    return kept


def stored(directory: Path, name: str = "test") -> kept_logins.Kept:
    """Return what is stored."""
    return load(Shelf(str(directory)), name)


def test_a_login_is_for_its_owner_only(directory: Path, provider: FakeOauth) -> None:
    """Directory 0700, file 0600, whatever the umask; nothing else lies around."""
    before = os.umask(0)
    try:
        make(directory, provider)
    finally:
        os.umask(before)

    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / "test.json").stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(directory)) == ["test.json", "test.lock"]
    assert Shelf(str(directory)).names() == ["test"]


def test_files_that_others_could_touch_are_refused(directory: Path, provider: FakeOauth, tmp_path: Path) -> None:
    """Open to others, a symbolic link, a pipe, too big: none is read, and the error says where; the twin is read."""
    make(directory, provider)
    shelf, path = Shelf(str(directory)), directory / "test.json"
    assert shelf.read("test")

    path.chmod(0o644)
    with pytest.raises(StepError, match="open to others"):
        shelf.read("test")
    path.chmod(0o600)
    path.rename(tmp_path / "aside")
    path.symlink_to(tmp_path / "aside")
    with pytest.raises(StepError, match="cannot be read"):
        shelf.read("test")
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(StepError, match="regular"):
        shelf.read("test")
    path.unlink()
    path.touch(0o600)
    os.truncate(path, 1 << 20)
    with pytest.raises(StepError, match="too big"):
        shelf.read("test")
    directory.chmod(0o755)
    with pytest.raises(StepError, match="nobody else"), shelf.held("test"):
        pass


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".", "A", "x" * 40, "a\0b"])
def test_a_name_is_no_path(directory: Path, name: str) -> None:
    """What is no name of a login opens nothing."""
    with pytest.raises(UsageError, match="no login"):
        Shelf(str(directory)).read(name)


def test_a_renewal_rotates(directory: Path, provider: FakeOauth) -> None:
    """Both tokens are new, the new ones are stored, and they work; a second renewal works, too."""
    kept = make(directory, provider, age_s=3400)
    renewals = Renewals(Shelf(str(directory)), poster({}))

    fresh = renewals.renew("test", kept.access_token)
    again = renewals.renew("test", fresh.access_token)

    assert stored(directory) == again
    assert len({kept.refresh_token, fresh.refresh_token, again.refresh_token}) == 3
    assert provider.is_good(again.access_token)
    assert stored(directory).renewing is None


def test_an_access_token_that_was_replaced_meanwhile_asks_nothing(directory: Path, provider: FakeOauth) -> None:
    """Whoever comes second finds the work done."""
    kept = make(directory, provider)
    renewals = Renewals(Shelf(str(directory)), poster({}))
    fresh = renewals.renew("test", kept.access_token)

    assert renewals.renew("test", kept.access_token) == fresh
    assert provider.renewals() == 1


PROCESS = """
import sys
sys.path[:0] = [sys.argv[1]]
from cloister.host.logins import Shelf
from cloister.runs.login_files import load
from cloister.runs.login_renewal import Renewals, poster
sys.stdin.readline()
print(Renewals(Shelf(sys.argv[2]), poster({})).renew("test", sys.argv[3]).access_token, flush=True)
"""


def test_processes_at_once_renew_once(directory: Path, provider: FakeOauth) -> None:
    """Four processes that find the same token due: one request, one answer for all, and the family lives."""
    kept = make(directory, provider, age_s=3400)
    provider.on_token = lambda: time.sleep(0.3)
    words = [sys.executable, "-c", PROCESS, str(SOURCE), str(directory), kept.access_token]
    processes = [subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]

    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    answers = {process.communicate(timeout=60)[0].strip() for process in processes}

    assert provider.renewals() == 1
    assert answers == {stored(directory).access_token}
    assert provider.is_good(stored(directory).access_token)


KILLED = """
import os, signal, sys
sys.path[:0] = [sys.argv[1]]
from cloister.host import logins as store
from cloister.host.logins import Shelf
from cloister.runs import login_renewal
left = int(sys.argv[4])
def step(function):
    def wrapped(*arguments, **named):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return function(*arguments, **named)
    return wrapped
send = step(login_renewal.poster({}))
for name in ("rename", "fsync", "open"):
    setattr(os, name, step(getattr(os, name)))
print(login_renewal.Renewals(Shelf(sys.argv[2]), send).renew("test", sys.argv[3]).access_token, flush=True)
"""


@pytest.mark.parametrize("steps", range(14))
def test_killed_at_any_step_the_login_is_whole(directory: Path, provider: FakeOauth, steps: int) -> None:
    """After SIGKILL at each step of a renewal the file is whole, and the access token in it works, old or new.

    Only where the answer had come and was not stored yet is the refresh token gone; the file says so, and the access
    token is used to its end.
    """
    kept = make(directory, provider, age_s=3400)
    words = [sys.executable, "-c", KILLED, str(SOURCE), str(directory), kept.access_token, str(steps)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)

    after = stored(directory)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    assert provider.is_good(after.access_token)
    if after.renewing is None:
        fresh = Renewals(Shelf(str(directory)), poster({})).renew("test", after.access_token)
        assert provider.is_good(fresh.access_token)
    else:
        assert kept_logins.judge(after, time.time()) == "good"
        assert after.access_token == kept.access_token
    assert done.returncode != 0 or after.access_token == done.stdout.strip()


def test_the_kill_points_cover_the_whole_renewal(directory: Path, provider: FakeOauth) -> None:
    """The last number of the test above lets a renewal end, and the first does not let it begin."""
    kept = make(directory, provider, age_s=3400)
    words = [sys.executable, "-c", KILLED, str(SOURCE), str(directory), kept.access_token]

    assert subprocess.run([*words, "0"], timeout=60, check=False).returncode == -signal.SIGKILL
    assert subprocess.run([*words, "13"], timeout=60, check=False, stdout=subprocess.DEVNULL).returncode == 0
    assert provider.renewals() == 1


def test_an_answer_lost_on_its_way_ends_in_one_clear_error(directory: Path, provider: FakeOauth) -> None:
    """Killed while the answer came: the next renewal shows a used token, and the person is told why, once."""
    kept = make(directory, provider, age_s=3599)
    begun = kept_logins.begun(kept, time.time())
    with Shelf(str(directory)).held("test") as held:
        held.write(kept_logins.encode(begun))
    provider.families[0].refresh = "rotated away"
    renewals = Renewals(Shelf(str(directory)), poster({}))

    with pytest.raises(RenewalError) as caught:
        renewals.renew("test", kept.access_token)

    text = render(caught.value.error)
    assert "login-expired" in text
    assert "broken off" in text
    assert "cloister login test" in text
    assert stored(directory).ended == "invalid_grant"
    with pytest.raises(RenewalError):
        renewals.renew("test", stored(directory).access_token)
    assert provider.renewals() == 1


def test_a_full_disk_after_the_answer_loses_nothing(
    directory: Path, provider: FakeOauth, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be written is written first at the next call, and is used only then."""
    kept = make(directory, provider, age_s=3400)
    renewals = Renewals(Shelf(str(directory)), poster({}))
    real, full = os.fsync, threading.Event()

    def fsync(descriptor: int) -> None:
        if full.is_set():
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    provider.on_token = full.set
    with pytest.raises(StepError, match="No space"):
        renewals.renew("test", kept.access_token)
    assert stored(directory).access_token == kept.access_token
    assert not list(directory.glob("*.new"))
    full.clear()

    fresh = renewals.renew("test", kept.access_token)

    assert provider.renewals() == 1
    assert provider.is_good(fresh.access_token)
    assert stored(directory) == fresh


@pytest.mark.parametrize(
    ("trouble", "reference"),
    [
        (Answer(500, b"oops"), "login-not-renewed"),
        (Answer(429, b"{}", {"Retry-After": "9"}), "login-not-renewed"),
        (Answer(200, b"<html>"), "login-not-renewed"),
        (Answer(200, b"x" * 400_000), "login-not-renewed"),
        (Answer(200, b'{"access_token": "at"}', cut=True), "login-not-renewed"),
        (Answer(200, b'{"access_token": "at", "token_type": "mac"}'), "login-refused"),
        (Answer(200, b'{"token_type": "Bearer"}'), "login-refused"),
        (Answer(302, b"", {"Location": "http://127.0.0.1:1/"}), "login-refused"),
        (Answer(400, b'{"error": "invalid_client"}'), "login-refused"),
        (Answer(400, b'{"error": "invalid_grant", "error_description": "rt-secret"}'), "login-expired"),
    ],
)
def test_bad_answers_change_nothing_but_what_they_say(
    directory: Path, provider: FakeOauth, trouble: Answer, reference: str
) -> None:
    """Garbage, huge, cut off, redirects, refusals: the tokens stay unless the provider says that they are over."""
    kept = make(directory, provider)
    provider.trouble = [trouble]

    with pytest.raises(RenewalError) as caught:
        Renewals(Shelf(str(directory)), poster({})).renew("test", kept.access_token)

    text = render(caught.value.error)
    assert caught.value.error.reference == reference
    assert not any(secret in text for secret in (kept.access_token, kept.refresh_token, "rt-secret"))
    after = stored(directory)
    assert after == kept if reference != "login-expired" else after.ended
    assert caught.value.retry_after_s == (9 if trouble.status == 429 else 0)


def test_a_renewal_that_takes_too_long_is_broken_off(
    directory: Path, provider: FakeOauth, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A provider that sends a byte now and then does not hold the lock for ever."""
    kept = make(directory, provider)
    monkeypatch.setattr("cloister.host.token_endpoint.post.__kwdefaults__", {"proxy": None, "deadline_s": 0.5})
    provider.trouble = [Answer(200, b" " * 400, drip=True)]
    began = time.monotonic()

    with pytest.raises(RenewalError) as caught:
        Renewals(Shelf(str(directory)), poster({})).renew("test", kept.access_token)

    assert time.monotonic() - began < 3
    assert "timeout" in caught.value.error.message
    assert stored(directory) == kept


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
