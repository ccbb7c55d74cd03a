"""The battery can fail against a weak daemon of root's: one that starts whatever it is asked for is found out."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_weak_sandboxes import facts
from weak_grounds import Bare

from cloister.host.frames import encode
from cloister.prove.canaries import Canaries
from cloister.prove.case import load
from cloister.prove.runner import Battery

pytestmark = pytest.mark.kernel

CASES = ("unit-hostd-places", "unit-hostd-words", "unit-hostd-carry")


def _serve(listener: socket.socket, answer: bytes) -> None:
    while True:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        with sock:
            _, descriptors, _, _ = socket.recv_fds(sock, 1 << 16, 16)
            for descriptor in descriptors:
                os.close(descriptor)
            sock.sendall(answer)
            with contextlib.suppress(ConnectionError):
                while sock.recv(1 << 16):  # until the caller has heard it
                    pass


@pytest.fixture(params=[b'{"run": {}}', b"refused"], ids=["starts-everything", "refuses-everything"])
def daemon(request: pytest.FixtureRequest, ground_base: Path) -> Iterator[tuple[str, bool]]:
    """Listen as root's daemon does; yields where, and whether it starts everything."""
    path = f"{ground_base}/hostd.sock"
    starts = request.param != b"refused"
    answer = encode("J", request.param) if starts else encode("F", b"}" + request.param)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=_serve, args=(listener, answer), daemon=True)
        thread.start()
        yield path, starts
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@pytest.mark.parametrize("name", CASES)
def test_a_daemon_that_is_no_judge_is_found_out(name: str, daemon: tuple[str, bool], ground_base: Path) -> None:
    """Where everything is started, attacks got through; where nothing is, nothing is proved."""
    path, starts = daemon
    known = facts(ground_base) | {"agent": "x", "hostd_socket": path, "unit_directories": [], "base": str(ground_base)}
    with Canaries(str(ground_base), str(ground_base)) as canaries:
        (result,) = Battery(Bare(ground_base), canaries, frozenset(), known).run([load()[name]])

    assert result.outcome == ("allowed" if starts else "error"), result.detail
