"""Connect to an abstract Unix socket of the host or of another run."""

import socket

from cloister.prove.inside.support import Box, read

ID = "ipc-abstract"
TITLE = "Connect to an abstract Unix socket of the host or of another run"
PROMISE = "P-041"
CLASSES = (42, 40)
EXPECT = "abstract names belong to a network namespace, and the sandbox has its own"
SHAPE = "any"
NEEDS = ("sibling",)


def attack(box: Box) -> None:
    """The canary's and the neighbour's; and the list of names must not show them."""
    for name in (str(box.fact("abstract_socket")), str(box.fact("sibling")["name"])):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
            box.connects(name, "ECONNREFUSED EPERM", socket.AF_UNIX, kind, f"\0{name}")
        box.must(name not in read("/proc/net/unix", 200000), f"{name}: not listed")


def twin(box: Box) -> None:
    """Own abstract sockets work, and descriptors can be passed within the run."""
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("\0cloister-prove-own")
        server.listen()
        client.connect("\0cloister-prove-own")
    one, two = socket.socketpair()
    with one, two, open("/dev/null") as file:
        socket.send_fds(one, [b"x"], [file.fileno()])
        box.works("a passed descriptor", len(socket.recv_fds(two, 1, 1)[1]) == 1)
