"""Connect to every socket that anybody on this host listens on."""

import socket

from cloister.prove.inside.support import Box

ID = "ipc-listed-sockets"
TITLE = "Connect to every socket that anybody on this host listens on"
PROMISE = "P-041"
CLASSES = (41, 42)
EXPECT = "by path they are not there; abstract names belong to another network namespace"
SHAPE = "any"


def attack(box: Box) -> None:
    """The list was made on the host, from /proc/net/unix."""
    names = [str(name) for name in box.fact("host_sockets")]
    for name in names:
        if len(name) > 107:
            continue
        target = "\0" + name[1:] if name.startswith("@") else name
        box.connects(name, "ENOENT ENOTDIR EACCES ECONNREFUSED", socket.AF_UNIX, socket.SOCK_STREAM, target)
    box.stopped(f"all: {len(names)} sockets tried")
