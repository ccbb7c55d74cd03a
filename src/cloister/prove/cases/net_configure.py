"""Configure interfaces with ioctl, and name files of the network."""

import fcntl
import os
import socket

from cloister.prove.inside.support import Box, append

ID = "net-configure"
TITLE = "Configure interfaces with ioctl, and name files of the network"
PROMISE = "P-036"
CLASSES = (45, 56)
EXPECT = "EPERM without CAP_NET_ADMIN; /etc is read-only"
SHAPE = "any"


def attack(box: Box) -> None:
    """Set lo's address and flags; add hosts and resolvers; open the tunnel device."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = b"lo".ljust(16, b"\0") + bytes(24)
        for name, number in (
            ("SIOCSIFFLAGS", 0x8914),
            ("SIOCSIFADDR", 0x8916),
            ("SIOCSIFMTU", 0x8922),
            ("SIOCADDRT", 0x890B),
            ("SIOCBRADDBR", 0x89A0),
        ):
            box.refused(
                name, "EPERM EACCES ENOIOCTLCMD EINVAL ENOTTY EOPNOTSUPP ENOPKG", fcntl.ioctl, sock, number, request
            )
        box.refused("SO_MARK", "EPERM", sock.setsockopt, socket.SOL_SOCKET, 36, 1)
        box.refused("SO_BINDTODEVICE", "EPERM ENODEV", sock.setsockopt, socket.SOL_SOCKET, 25, b"eth0\0")
        box.refused("IP_TRANSPARENT", "EPERM", sock.setsockopt, socket.IPPROTO_IP, 19, 1)
    for path in ("/etc/hosts", "/etc/resolv.conf", "/etc/nsswitch.conf", "/etc/gai.conf"):
        box.refused(path, "EROFS EACCES", append, path, "127.0.0.1 api.anthropic.com\n")
    box.refused("/dev/net/tun", "ENOENT EACCES", os.open, "/dev/net/tun", os.O_RDWR)
