"""QEMU's control socket: a monitor that lies, floods or hangs is refused in time, and is never obeyed."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from cloister.host import qmp

pytestmark = pytest.mark.kernel
GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a control socket: ours, the monitor's."""
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def play(sock: socket.socket, *answers: bytes) -> Callable[[], bytes]:
    """Greet, then answer each command with the next of these; return a function for what was heard."""
    heard = b""

    def run() -> None:
        nonlocal heard
        sock.sendall(GREETING)
        for answer in (b'{"return": {}}\n', *answers):
            line = b""
            while not line.endswith(b"\n"):
                piece = sock.recv(65536)
                if not piece:
                    return
                line += piece
            heard += line
            try:
                sock.sendall(answer)
            except OSError:
                return

    threading.Thread(target=run, daemon=True).start()
    return lambda: heard


def test_a_command_is_answered_behind_events(pair: tuple[socket.socket, socket.socket]) -> None:
    """Events before an answer are passed over; its result is returned."""
    ours, theirs = pair
    play(theirs, b'{"event": "STOP"}\n{"event": "RESUME"}\n{"return": {"running": true}}\n')
    assert qmp.Qmp(ours).call("query-status") == {"running": True}


@pytest.mark.parametrize(
    "greeting", [b"SSH-2.0-x\r\n", b"[]\n", b'{"return": {}}\n', b'{"QMP": 1}\n', b"[" * 70_000 + b"\n", b""]
)
def test_what_is_no_monitor_is_told_nothing(pair: tuple[socket.socket, socket.socket], greeting: bytes) -> None:
    """Whatever else listens there hears no command of ours."""
    ours, theirs = pair
    theirs.sendall(greeting)
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(qmp.QmpError):
        qmp.Qmp(ours, timeout_s=1)
    ours.close()
    assert theirs.recv(100) == b""


@pytest.mark.parametrize(
    "answer",
    [b'{"error": {"class": "x", "desc": "no"}}\n', b"not json\n", b'"text"\n', b'{"error": 5}\n',
     b'{"event": "A"}\n' * (qmp.MAX_EVENTS + 1)],
)  # fmt: skip
def test_an_answer_that_is_none_is_an_error(pair: tuple[socket.socket, socket.socket], answer: bytes) -> None:
    """A refusal, nonsense and a flood of events end the call with a clear error."""
    ours, theirs = pair
    play(theirs, answer)
    with pytest.raises(qmp.QmpError):
        qmp.Qmp(ours, timeout_s=2).call("stop")


def test_a_line_without_an_end_is_not_kept(pair: tuple[socket.socket, socket.socket]) -> None:
    """A line longer than 256 KiB breaks the conversation."""
    ours, theirs = pair
    play(theirs, b"x" * (2 * qmp.MAX_LINE))
    with pytest.raises(qmp.QmpError, match="line of more"):
        qmp.Qmp(ours, timeout_s=5).call("stop")


def test_a_monitor_that_hangs_is_not_waited_for(pair: tuple[socket.socket, socket.socket]) -> None:
    """Without an answer the call ends when its time is over, also when bytes trickle in."""
    ours, theirs = pair
    play(theirs, b'{"re')
    monitor = qmp.Qmp(ours, timeout_s=0.5)
    began = time.monotonic()
    with pytest.raises(qmp.QmpError, match="silent"):
        monitor.call("stop")
    assert time.monotonic() - began < 5


def test_words_of_a_monitor_are_shown_without_control_characters(pair: tuple[socket.socket, socket.socket]) -> None:
    """What a monitor says of an error reaches a terminal as text only."""
    ours, theirs = pair
    play(theirs, b'{"error": {"desc": "bad \\u001b[31m\\u0000 thing"}}\n')
    with pytest.raises(qmp.QmpError) as caught:
        qmp.Qmp(ours).call("stop")
    assert "\x1b" not in caught.value.message
    assert "thing" in caught.value.message


def test_preloaded_orders_are_all_there(pair: tuple[socket.socket, socket.socket]) -> None:
    """A monitor that starts finds its orders without anybody waiting for it, each on a line, in order."""
    theirs, ours = qmp.restore_orders(11, shared=True)
    lines = os.read(theirs, 65536).decode().splitlines()
    assert ["qmp_capabilities" in lines[0], "x-ignore-shared" in lines[1], '"fd:11"' in lines[3]] == [True] * 3
    assert '"announce-rounds": 0' in lines[2], "a machine with a card would speak before its guest does"
    assert len(lines) == 4
    os.close(theirs)
    os.close(ours)
