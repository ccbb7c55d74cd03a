"""The user's authority: kept, renewed, and never half there, whatever kills its maker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cloister.credentials.certificates import Pair, load_issuer
from cloister.host import private_files
from cloister.runs.authority import Authorities

pytestmark = pytest.mark.kernel
DAY = 86_400.0


def stored(folder: Path) -> Path:
    """Return the file it is kept in."""
    return folder / "authority/authority.pem"


def test_it_is_made_once_and_kept(tmp_path: Path) -> None:
    """The next broker uses the same one; file and folder are the user's alone."""
    first = Authorities(str(tmp_path)).current()
    again = Authorities(str(tmp_path))

    assert again.current().certificate == first.certificate
    assert again.current() is again.current()
    assert stored(tmp_path).stat().st_mode & 0o777 == 0o600
    assert stored(tmp_path).parent.stat().st_mode & 0o777 == 0o700
    assert first.certificate in stored(tmp_path).read_bytes()
    assert b"PRIVATE" not in first.certificate


def test_it_is_renewed_before_its_end(tmp_path: Path) -> None:
    """A run gets one that lasts; a run that has the old one keeps it."""
    now = [time.time()]
    authorities = Authorities(str(tmp_path), lambda: now[0])
    first = authorities.current()
    now[0] += 300 * DAY
    same = authorities.current()
    now[0] += 50 * DAY
    second = authorities.current()

    assert same is first
    assert second.certificate != first.certificate
    assert first.authority.context("a.example.org")


@pytest.mark.parametrize("damage", ["", "garbage", "half", "other key", "readable", "link", "clock"])
def test_what_cannot_be_trusted_is_replaced(tmp_path: Path, damage: str) -> None:
    """Empty, cut, mixed with another key, readable by others, a link, from the future: a new one is made."""
    file = stored(tmp_path)
    before = Authorities(str(tmp_path)).current().certificate
    data = file.read_bytes()
    match damage:
        case "half":
            file.write_bytes(data[: len(data) // 2])
        case "other key":
            other = Authorities(str(tmp_path / "x")).current().certificate
            file.write_bytes(data.replace(before, other))
        case "readable":
            file.chmod(0o644)
        case "link":
            file.rename(tmp_path / "elsewhere")
            file.symlink_to(tmp_path / "elsewhere")
        case "clock":
            before = Authorities(str(tmp_path), lambda: time.time() + 1000 * DAY).current().certificate
        case _:
            file.write_text(damage)
    after = Authorities(str(tmp_path)).current()

    assert after.certificate != before
    key, mark, rest = file.read_bytes().partition(b"-----BEGIN CERTIFICATE-----")
    assert load_issuer(Pair(key, mark + rest))
    assert file.stat().st_mode & 0o777 == 0o600
    assert not file.is_symlink()


MAKER = """
import sys, time
from cloister.runs.authority import Authorities
now = [time.time()]
authorities = Authorities(sys.argv[1], lambda: now[0])
print("ready", flush=True)
while True:
    authorities.current()
    now[0] += 360 * 86400
    if now[0] > time.time() + 20 * 360 * 86400:
        now[0] = time.time()
"""


def test_a_killed_maker_leaves_a_whole_one(tmp_path: Path) -> None:
    """Killed at any moment, the file is the old or the new one, and its lock is free."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for step in range(12):
        maker = subprocess.Popen([sys.executable, "-c", MAKER, str(tmp_path)], env=environment, stdout=subprocess.PIPE)
        assert maker.stdout is not None
        assert maker.stdout.readline() == b"ready\n"
        time.sleep(0.002 * step)
        maker.send_signal(signal.SIGKILL)
        maker.wait()
        maker.stdout.close()
        data = private_files.read(str(stored(tmp_path)))
        if data is not None:
            key, mark, rest = data.partition(b"-----BEGIN CERTIFICATE-----")
            assert load_issuer(Pair(key, mark + rest))
    assert Authorities(str(tmp_path)).current()


def test_two_makers_agree(tmp_path: Path) -> None:
    """Two brokers that begin at once end with one authority."""
    code = f"from cloister.runs.authority import Authorities as A; print(A({str(tmp_path)!r}).current().certificate)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    makers = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) for _ in range(4)]
    said = {maker.communicate(timeout=60)[0] for maker in makers}

    assert len(said) == 1
    assert b"BEGIN CERTIFICATE" in said.pop()
