"""The link into a real guest, through the installed program: bulk, many at once, and what its kernel tells."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from support.guest_user import GuestUser, Installs
from support.homes import make_home, make_workspace

MIB = 1 << 20


class Living(NamedTuple):
    """A user with one guest that lives."""

    user: GuestUser
    workspace: Path
    run: str


@pytest.fixture(scope="module")
def living(image: Installs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Living]:
    """One guest for the tests of this file."""
    home = make_home(tmp_path_factory.mktemp("links") / "home")
    workspace = make_workspace(home / "src/project")
    user = GuestUser(home, image)
    yield Living(user, workspace, user.begin(cwd=workspace))
    user.close()


def test_bulk_goes_in_whole(living: Living) -> None:
    """What a guest reads from its caller is every byte, in order: virtio-serial, credits and pipes in one row."""
    data = os.urandom(4 * MIB).hex().encode()  # the support writes text
    done = living.user.exec(living.run, "sha256sum", cwd=living.workspace, stdin=data)
    assert done.stdout.split()[0] == hashlib.sha256(data).hexdigest()


def test_bulk_comes_out_whole(living: Living) -> None:
    """And what a caller reads from a guest."""
    done = living.user.exec(living.run, "head -c 8388608 /dev/zero | tr '\\0' x", cwd=living.workspace)
    assert (len(done.stdout), set(done.stdout)) == (8 * MIB, {"x"})


def test_commands_at_once_do_not_mix(living: Living) -> None:
    """Eight callers, each with an input, an output and an exit code of his own."""

    def say(number: int) -> tuple[int, str]:
        done = living.user.exec(living.run, f"cat; exit {number}", cwd=living.workspace, stdin=b"%d" % number)
        return done.returncode, done.stdout

    with ThreadPoolExecutor(8) as callers:
        assert list(callers.map(say, range(8))) == [(number, str(number)) for number in range(8)]


def test_a_process_killed_for_want_of_memory_is_told(living: Living) -> None:
    """The guest's kernel takes a program that uses up its memory; the run's events name it, the run goes on."""
    hog = "python3 -c 'exec(\"x=[]\\nwhile 1: x.append(bytes([1])*(8<<20))\")'"
    assert living.user.exec(living.run, hog, cwd=living.workspace).returncode == 137
    (events,) = living.user.home.glob(f".local/state/cloister/runs/{living.run}/events.jsonl")
    end = time.monotonic() + 10
    while "out-of-memory" not in events.read_text() and time.monotonic() < end:
        time.sleep(0.1)
    told = [json.loads(line) for line in events.read_text().splitlines() if "out-of-memory" in line]
    assert [told[0]["event"], told[0]["guest_event"]] == ["guest", "out-of-memory"]
    assert "python3" in told[0]["guest_text"]
    assert living.user.exec(living.run, "exit 3", cwd=living.workspace).returncode == 3
