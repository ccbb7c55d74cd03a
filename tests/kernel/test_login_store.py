"""Logins on a real file system, against a provider that keeps its rules: rotation, kill points, several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cloister.credentials import logins as kept_logins
from cloister.errors import StepError, UsageError, render
from cloister.host.logins import Shelf
from cloister.runs.login_renewal import RenewalError, Renewals, poster
from support.fake_oauth import Answer, FakeOauth
from support.kept_logins import make, stored

pytestmark = pytest.mark.kernel
SOURCE = Path(kept_logins.__file__).parents[2]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The directory of the store."""
    return tmp_path / "logins"


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
