"""Connect to a Unix socket of the host by its path."""

import os
import socket

from cloister.prove.inside.support import Box

ID = "ipc-unix-socket"
TITLE = "Connect to a Unix socket of the host by its path"
PROMISE = "P-041"
CLASSES = (41,)
EXPECT = "it is not there"


def attack(box: Box) -> None:
    """The canary's socket, directly and through links of /proc."""
    path = str(box.fact("unix_socket"))
    for each in (path, f"/proc/self/root{path}", f"/proc/self/cwd/{os.path.relpath(path, box.workspace)}"):
        box.connects(each, "ENOENT EACCES", socket.AF_UNIX, socket.SOCK_STREAM, each)


def twin(box: Box) -> None:
    """Own sockets work."""
    path = "/tmp/cloister-prove-own.sock"
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(path)
        server.listen()
        client.connect(path)
        box.works("an own socket", True)
    os.unlink(path)
