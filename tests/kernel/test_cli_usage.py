"""`cloister usage` as installed: beside a process that writes, on terminals of any width, without a broker."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path

import pytest

from support.books import ended, noted, open_books
from support.cloister import User
from support.terminal import Terminal

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]


def test_what_is_read_beside_a_writer_is_never_too_little_or_twice(user: User, workspace: Path) -> None:
    """While calls are written, every answer holds at least those that had closed, and none twice."""
    books = open_books(user.state / "ledger", segment_bytes=20_000)
    done = started = 0
    stop = threading.Event()

    def write() -> None:
        nonlocal done, started
        while not stop.is_set():
            row = noted(started, time=time.time())
            started += 1
            books.opened(row)
            books.closed(ended(row))
            done += 1
            time.sleep(0.0005)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(4):
            before = done
            answer = json.loads(user.run("usage", "--json", cwd=workspace).stdout)
            assert before <= answer["total"]["requests"] <= started
            assert answer["total"]["output_tokens"] == 20 * answer["total"]["requests"]
            assert answer["under_way"] <= 1
    finally:
        stop.set()
        writer.join()
        books.close()
    last = json.loads(user.run("usage", "--json", cwd=workspace).stdout)
    assert last["total"]["requests"] == done
    assert last["under_way"] == 0
    assert user.broker_pid == 0, "it asked no broker, and started none"


@pytest.mark.parametrize("columns", [48, 80, 140])
def test_the_table_fits_its_terminal_and_is_plain_elsewhere(user: User, workspace: Path, columns: int) -> None:
    """On a terminal lines fit and have colour; in a pipe, or with NO_COLOR, there is none."""
    books = open_books(user.state / "ledger")
    for number in range(30):
        row = noted(number, time=time.time() - number * 86400 / 2, agent=("claude", "a-much-longer-name")[number % 2])
        books.opened(row)
        books.closed(ended(row))
    assert books.drained(10)
    books.close()

    with Terminal(user.command("usage"), cwd=workspace, env=user.environment, size=(40, columns)) as terminal:
        assert terminal.wait() == 0
        shown = terminal.shown.decode()
    assert "\x1b[" in shown
    table = re.sub(r"\x1b\[[0-9;]*m", "", shown).replace("\r", "").split("\n\n")[0]
    assert max(map(len, table.splitlines())) <= columns
    assert "COST" in table
    assert ("PER DAY" in table) == (columns > 80)
    assert "\x1b" not in user.run("usage", cwd=workspace).stdout
    with Terminal(
        user.command("usage"), cwd=workspace, env={**user.environment, "NO_COLOR": "1"}, size=(40, columns)
    ) as terminal:
        assert terminal.wait() == 0
        assert b"\x1b" not in terminal.shown
