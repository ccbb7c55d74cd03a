"""What a client says when its broker dies: one clear error, no traceback."""

import _socket
import contextlib

import pytest

from cloister.errors import RetryError
from cloister.runs import client


@pytest.mark.parametrize("unread", [b"request", b""])
def test_a_broker_that_dies_is_named(unread: bytes) -> None:
    """A reset (the request was not read) and an end (it was) both say that the broker went away; an answer is one."""
    ours, theirs = _pair()
    with contextlib.closing(theirs):
        theirs.sendall(client.frame(b"F", b"\x00{}"))
        assert client._answer(ours) == (0, b"{}")

    ours, theirs = _pair()
    ours.sendall(unread)
    theirs.close()
    with pytest.raises(RetryError, match="went away"):
        client._answer(ours)


def _pair() -> tuple[_socket.socket, _socket.socket]:
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
    return ours, theirs
