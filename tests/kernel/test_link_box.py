"""What a guest has of its run's box: sockets by name, published ports, renewed files; and nothing else of the host."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from keeper_rig import Keeper, Place, place_of_test

pytestmark = pytest.mark.kernel
place = pytest.fixture(place_of_test)
MIB = 1 << 20

CLIENT = """
import socket, sys, threading
client = socket.create_connection(("127.0.0.1", 3128))
client.sendall(sys.argv[1].encode() + b"\\n")
if len(sys.argv) > 2:
    def send():
        for _ in range(int(sys.argv[2])): client.sendall(bytes(1 << 20))
        client.shutdown(socket.SHUT_WR)
    threading.Thread(target=send).start()
else:
    client.shutdown(socket.SHUT_WR)
total, last = 0, b""
while data := client.recv(1 << 20):
    total += len(data); last = data
print(total, last[-20:].decode(errors="replace"))
"""


@pytest.fixture
def keeper(place: Place) -> Iterator[Keeper]:
    """A keeper that waits for its `B`."""
    made = Keeper(place)
    yield made
    made.close()


def test_the_relay_is_reached_through_the_box(keeper: Keeper) -> None:
    """A program's connection to 127.0.0.1:3128 in the guest ends at the run's own socket on the host, and back."""
    status, out, err = keeper.run("/usr/bin/python3", "-c", CLIENT, "echo hello")
    assert (status, err) == (0, b"")
    assert out == b"0 \n"


@pytest.mark.parametrize(("words", "megabytes", "expected"), [
    ("source 52428800", [], b"52428800"), ("count", ["50"], b"52428800"),
])  # fmt: skip
def test_bulk_through_a_socket_of_the_box_is_whole(
    keeper: Keeper, words: str, megabytes: list[str], expected: bytes
) -> None:
    """50 MB from the relay, and 50 MB to it with a half-close at the end."""
    status, out, _ = keeper.run("/usr/bin/python3", "-c", CLIENT, words, *megabytes, timeout_s=40)
    assert status == 0
    assert expected in out


def test_many_connections_at_once(keeper: Keeper) -> None:
    """More connections than the link carries at once wait their turn: each is answered."""
    script = """
import socket, sys
clients = [socket.create_connection(("127.0.0.1", 3128)) for _ in range(600)]
answered = 0
for client in clients:
    client.sendall(b"echo x\\nhere"); client.shutdown(socket.SHUT_WR)
for client in clients:
    answered += client.recv(10) == b"here"; client.close()
print(answered)
"""
    status, out, err = keeper.run("/usr/bin/python3", "-c", script, timeout_s=40)
    assert (status, out, err) == (0, b"600\n", b"")
    assert keeper.place.relay.most <= 512


def test_a_socket_that_the_plan_does_not_name_is_nobodys(place: Place) -> None:
    """Attack: a second socket in the box that was not given to the guest cannot be asked for; the given one can."""
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(place.box / "other.sock"))
        other.listen()
        keeper = Keeper(place)
        keeper.send_begin("socket=other.sock")
        assert keeper.until("P")
        script = (
            'import socket; s = socket.socket(socket.AF_UNIX); s.connect("/run/cloister/box/other.sock"); s.recv(1)'
        )
        with open(os.devnull, "r+b") as null:
            keeper.go("/usr/bin/python3", "-c", script, stdio=[null.fileno()] * 3)
        died = keeper.died()
        assert died["reason"] == "guest-protocol"
        assert "was not given" in died["text"]
        other.settimeout(0.2)
        with pytest.raises(TimeoutError):
            other.accept()
        keeper.close()


def test_a_given_socket_is_reached_by_its_name(place: Place) -> None:
    """Its twin: with `--socket` the same program gets through."""
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(place.box / "other.sock"))
        (place.box / "other.sock").chmod(0o666)
        other.listen()
        keeper = Keeper(place, "--socket", "other.sock")
        keeper.send_begin("socket=other.sock")
        assert keeper.until("P")
        script = """
import socket
s = socket.socket(socket.AF_UNIX); s.connect("/run/cloister/box/other.sock")
s.send(b"hi"); s.recv(1)  # the run's end, which is the program's, would cut what is under way
"""
        with open(os.devnull, "r+b") as null:
            keeper.go("/usr/bin/python3", "-c", script, stdio=[null.fileno()] * 3)
        other.settimeout(10)
        connection, _ = other.accept()
        with connection:
            assert connection.recv(10) == b"hi"
        assert keeper.ended() == 0
        keeper.close()


def test_nobody_listens_is_told(place: Place) -> None:
    """A socket of the box whose server is gone: the program sees its connection cut, and the run goes on."""
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(place.box / "gone.sock"))
    keeper = Keeper(place, "--socket", "gone.sock")
    keeper.send_begin("socket=gone.sock")
    assert keeper.until("P")
    script = """
import socket
s = socket.socket(socket.AF_UNIX); s.connect("/run/cloister/box/gone.sock")
try: print(s.recv(1))
except OSError as error: print(error)
"""
    with (place.work / "out").open("w+b") as out, open(os.devnull, "r+b") as null:
        keeper.go("/usr/bin/python3", "-c", script, stdio=[null.fileno(), out.fileno(), out.fileno()])
        assert keeper.ended() == 0
    assert (place.work / "out").read_bytes() in {b"b''\n", b"[Errno 104] Connection reset by peer\n"}
    keeper.close()


SERVER = """
import socket, threading
server = socket.create_server(("127.0.0.1", 18789))
print("up", flush=True)
def answer(client):
    total = 0
    while part := client.recv(1 << 16): total += len(part)
    client.sendall(b"%d bytes" % total); client.close()
while True:
    threading.Thread(target=answer, args=(server.accept()[0],)).start()
"""


@contextlib.contextmanager
def published(place: Place) -> Iterator[tuple[Keeper, int]]:
    """Yield a keeper that publishes the guest's port 18789, and the port on the host."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        keeper = Keeper(place, "--publish", f"{listener.fileno()}:18789", pass_fds=[listener.fileno()])
    keeper.begin()
    try:
        yield keeper, port
    finally:
        keeper.close()


def test_a_published_port_is_reached_from_the_host(place: Place) -> None:
    """A connection to the host's listener is one to the guest's own 127.0.0.1, with half-closes and bulk."""
    with published(place) as (keeper, port):
        out_end, theirs = os.pipe()
        with open(os.devnull, "r+b") as null:
            keeper.go("/usr/bin/python3", "-c", SERVER, stdio=[null.fileno(), theirs, null.fileno()])
        os.close(theirs)
        assert os.read(out_end, 10) == b"up\n"
        for size in (0, 5, 20 * MIB):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.settimeout(20)
                sender = threading.Thread(target=_send, args=(client, size))
                sender.start()
                assert client.recv(100) == b"%d bytes" % size
                sender.join()
        os.close(out_end)


def _send(client: socket.socket, size: int) -> None:
    client.sendall(bytes(size))
    client.shutdown(socket.SHUT_WR)


def test_a_published_port_without_a_server_is_cut(place: Place) -> None:
    """Nobody listens in the guest: the host's client is reset, and the run goes on."""
    with published(place) as (keeper, port):
        with open(os.devnull, "r+b") as null:
            keeper.go("/bin/sleep", "60", stdio=[null.fileno()] * 3)
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.settimeout(10)
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        keeper.channel.send("S", bytes([signal.SIGTERM]))
        assert keeper.ended() == 128 + signal.SIGTERM


def renew(path: Path, text: str) -> None:
    """Write a file as the broker does: a new one takes the old one's name."""
    path.parent.mkdir(exist_ok=True)
    path.parent.chmod(0o755)
    partial = path.parent / f".{path.name}.partial"
    partial.write_text(text)
    partial.chmod(0o644)
    partial.replace(path)


def test_renewed_files_of_the_box_appear_in_the_guest(keeper: Keeper) -> None:
    """A token that the broker renews by rename is the new one in the guest, also in a directory made later."""
    renew(keeper.place.box / "identity" / "one.jwt", "old")
    keeper.begin()
    wait = 'until grep -q "$1" "$2" 2>/dev/null; do sleep 0.05; done; cat "$2"'
    for number, (name, text) in enumerate([("identity/one.jwt", "new"), ("later/two.jwt", "second")], 1):
        out_end, theirs = os.pipe()
        path = f"/run/cloister/box/{name}"
        with open(os.devnull, "r+b") as null:
            stdio = [null.fileno(), theirs, null.fileno()]
            if number == 1:
                keeper.go("/bin/sleep", "60", stdio=[null.fileno()] * 3)
            keeper.execute(number, "/bin/sh", "-c", wait, "sh", text, path, stdio=stdio)
        os.close(theirs)
        keeper.until("R", number)
        renew(keeper.place.box / name, text)
        assert keeper.ended(number, 10) == 0
        assert os.read(out_end, 100) == text.encode()
        os.close(out_end)


def test_a_file_renewed_before_the_guest_was_there_is_the_newer_one(place: Place) -> None:
    """What changes between the tar and the guest's hello is not lost."""
    keeper = Keeper(place)
    keeper.send_begin()
    renew(place.box / "identity" / "early.jwt", "early")
    assert keeper.until("P")
    script = "for i in $(seq 100); do cat /run/cloister/box/identity/early.jwt && exit 0; sleep 0.05; done; exit 1"
    with (place.work / "out").open("w+b") as out, open(os.devnull, "r+b") as null:
        keeper.go("/bin/sh", "-c", script, stdio=[null.fileno(), out.fileno(), null.fileno()])
        assert keeper.ended() == 0
    assert (place.work / "out").read_bytes() == b"early"
    keeper.close()


def test_links_and_large_files_are_not_sent(keeper: Keeper) -> None:
    """Attack from the host's side of the box: a link there leads to no file of the host's in the guest."""
    keeper.begin()
    renew(keeper.place.box / "large", "x" * 70_000)
    (keeper.place.box / "link.partial").symlink_to("/etc/passwd")
    (keeper.place.box / "link.partial").rename(keeper.place.box / "link")
    renew(keeper.place.box / "good", "good")
    script = "until [ -e /run/cloister/box/good ]; do sleep 0.05; done; ls /run/cloister/box"
    with (keeper.place.work / "out").open("w+b") as out, open(os.devnull, "r+b") as null:
        keeper.go("/bin/sh", "-c", script, stdio=[null.fileno(), out.fileno(), null.fileno()])
        assert keeper.ended() == 0
    assert (keeper.place.work / "out").read_text().split() == ["egress.sock", "good"]


def test_the_relay_may_be_slow_without_costing_memory(keeper: Keeper) -> None:
    """A server that reads nothing stops its client in the guest at the window, not in the keeper's memory."""
    keeper.begin()
    script = """
import socket, threading
def flood():
    client = socket.create_connection(("127.0.0.1", 3128)); client.sendall(b"stall\\n")
    while True: client.sendall(bytes(1 << 16))
for _ in range(20): threading.Thread(target=flood).start()
"""
    with open(os.devnull, "r+b") as null:
        keeper.go("/usr/bin/python3", "-c", script, stdio=[null.fileno()] * 3)
    time.sleep(1.5)
    resident = next(
        int(line.split()[1]) for line in Path(f"/proc/{keeper.pid}/status").read_text().splitlines() if "VmRSS" in line
    )
    assert resident < 16 * 1024
    keeper.channel.send("S", bytes([signal.SIGKILL]))
    assert keeper.ended() == 137
