"""A connection of the broker whose other end goes: what was said before is heard, then the end."""

import asyncio
import socket

import pytest

from cloister.host.frames import Frame, encode
from cloister.services.connection import Connection

pytestmark = pytest.mark.kernel


def _last_words(*, send: bool) -> list[str]:
    """Return what an owner hears of an end that said something and closed, with unread frames in its queue."""
    heard: list[str] = []

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        over = loop.create_future()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)

        def on_close(_: Connection) -> None:
            heard.append("closed")
            over.set_result(None)

        def on_frame(_: Connection, frame: Frame) -> None:
            heard.append(frame.kind)

        connection = Connection(loop, ours, on_frame, on_close)
        connection.send("S", b"\x0f")  # never read by the other end: its close resets the connection
        theirs.sendall(encode("E", b"\0\0\0\0\x8f"))
        theirs.close()
        if send:
            connection.send("S", b"\x12")
            connection.send("S", b"\x12")
        await asyncio.wait_for(over, 5)

    asyncio.run(scene())
    return heard


def test_what_has_come_is_heard_when_somebody_asks() -> None:
    """Before the loop gets to it, in order, and the end too; asking again, or of a closed end, does nothing."""
    heard: list[str] = []

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        connection = Connection(loop, ours, lambda _, frame: heard.append(frame.kind), lambda _: heard.append("closed"))
        connection.hear()
        theirs.sendall(encode("P", b"") + encode("E", b"\0\0\0\0\x09"))
        connection.hear()
        assert heard == ["P", "E"]
        theirs.close()
        connection.hear()
        connection.hear()
        await asyncio.sleep(0.05)

    asyncio.run(scene())
    assert heard == ["P", "E", "closed"]


@pytest.mark.parametrize("send", [False, True])
def test_last_words_are_heard_before_the_end(*, send: bool) -> None:
    """A frame that came before the other end went is delivered, also when a send finds out first that it went."""
    assert _last_words(send=send) == ["E", "closed"]
