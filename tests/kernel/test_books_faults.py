"""The books on a real kernel: processes killed at any instant, a disk that is really full, two processes at once."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.books import ended, noted, open_books, stored

pytestmark = pytest.mark.kernel

PATHS = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

WRITER = """
import os, sys
from pathlib import Path
from support.books import ended, noted, open_books
books = open_books(Path(sys.argv[1]), segment_bytes=int(sys.argv[3]))
first = int(sys.argv[2])
for number in range(first, first + 1_000_000):
    row = noted(number)
    books.opened(row)
    os.write(1, b"o%d\\n" % number)
    if number % 7:
        books.closed(ended(row))
        os.write(1, b"c%d\\n" % number)
"""

FULL = """
import os, sys
from pathlib import Path
from support.books import ended, noted, open_books, stored
place = Path(sys.argv[1])
filler = place / "filler"
told = []
books = open_books(place / "books", told.append)
filler.write_bytes(bytes(900_000))
rows, noticed = {}, 0
for number in range(20_000):
    try:
        books.opened(noted(number))
    except OSError as error:
        noticed = error.errno
        break
    rows[noted(number).id] = noted(number)
    if number % 3:
        books.closed(ended(noted(number)))
        rows[noted(number).id] = ended(noted(number))
assert noticed == 28, f"no ENOSPC after {len(rows)} calls: {noticed}"
for number in range(0, len(rows), 3):  # what was under way ends while nothing can be written
    books.closed(ended(noted(number)))
    rows[noted(number).id] = ended(noted(number))
spent = books.spent("claude", 0, 4e9)
assert (spent.requests, spent.tokens) == (len(rows), 120 * len(rows)), spent
assert books.health().dropped == 0
filler.unlink()
after = noted(1_000_000)
books.opened(after)  # recovers by itself
books.closed(ended(after))
rows[after.id] = ended(after)
assert books.drained(60), (books.health(), told)
books.close()
assert stored(place / "books") == rows
print("kept", len(rows), told)
"""


def _write_until_killed(directory: Path, first: int, patience_s: float, segment_bytes: int) -> list[str]:
    """Return what a writer said it had done before it was killed."""
    words = [sys.executable, "-c", WRITER, str(directory), str(first), str(segment_bytes)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=PATHS) as process:
        assert process.stdout is not None
        said = b""
        deadline = time.monotonic() + 30
        until = deadline
        while time.monotonic() < until:
            ready, _, _ = select.select([process.stdout], [], [], 0.001)
            if ready:
                data = os.read(process.stdout.fileno(), 1 << 16)
                assert data, "the writer ended by itself"
                if not said:
                    until = time.monotonic() + patience_s
                said += data
        process.send_signal(signal.SIGKILL)
        said += process.stdout.read()
    assert time.monotonic() < deadline, "the writer never began"
    return said.decode().splitlines()


def test_kill_9_loses_no_call_and_doubles_none(tmp_path: Path) -> None:
    """Killed at random instants while it writes as fast as it can, no noted call is lost, none is there twice."""
    chance = random.Random(3)  # noqa: S311  # instants, not secrets
    done: dict[str, str] = {}
    rounds = 8
    for number in range(rounds):
        size = chance.choice([4096, 1 << 20])
        for word in _write_until_killed(tmp_path, number * 1_000_000, chance.uniform(0.0, 0.12), size):
            done[word[1:]] = word[0]
    assert len(done) > 100

    books = open_books(tmp_path)
    assert books.drained(30)
    books.close()

    rows = stored(tmp_path)
    for number, letter in done.items():
        expected = ended(noted(int(number))) if letter == "c" else noted(int(number))
        row = rows.pop(noted(int(number)).id)
        # Killed after the close was written and before it was said, a call is closed.
        assert row == expected or (letter == "o" and int(number) % 7 and row == ended(noted(int(number))))
    assert len(rows) <= rounds, "at most one call per kill was noted and not yet said"


def test_a_second_process_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    """Another process gets `ledger-in-use`; after the first was killed, a third one starts at once."""
    books = open_books(tmp_path)
    words = [sys.executable, "-c", WRITER, str(tmp_path), "1", "4096"]
    done = subprocess.run(words, env=PATHS, capture_output=True, text=True, timeout=30, check=False)
    assert "another process keeps these books" in done.stderr
    assert done.stdout == ""
    books.close()

    assert _write_until_killed(tmp_path, 0, 0.02, 4096)
    open_books(tmp_path).close()


def test_a_full_disk_is_survived(tmp_path: Path) -> None:
    """On a full file system of 1 MiB calls are refused; what ends then is kept, and written when it can be."""
    place = tmp_path / "small"
    place.mkdir()
    script = 'mount -t tmpfs -o size=1m none "$1" && exec "$2" -c "$3" "$1"'
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(place), sys.executable]
    done = subprocess.run([*words, FULL], env=PATHS, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kept" in done.stdout
