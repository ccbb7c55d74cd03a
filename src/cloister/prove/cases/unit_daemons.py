"""Talk to the daemons of the system: root's, the broker's, systemd's, the bus."""

import glob
import os
import socket

from cloister.prove.inside.support import Box

ID = "unit-daemons"
TITLE = "Talk to the daemons of the system: root's, the broker's, systemd's, the bus"
PROMISE = "P-291"
CLASSES = (41, 43, 63, 69)
EXPECT = "none of their sockets is there, by no spelling"
SHAPE = "any"
IF_POLICY = ("unit",)


def attack(box: Box) -> None:
    """Each path, and through every root that /proc offers; then by abstract names as systemd has them."""
    roots = ["", "/proc/self/root", "/proc/1/root", "/proc/1/cwd", "/run/systemd/incoming", "/var"]
    places = [*box.fact("unit_sockets"), "/run/systemd/private", "/run/systemd/notify", "/run/cloister/broker.sock"]
    for root in roots:
        for path in places:
            for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM):
                names = "ENOENT ENOTDIR EACCES ESRCH EPERM EPROTONOSUPPORT"
                box.connects(f"{root}{path}", names, socket.AF_UNIX, kind, f"{root}{path}")
    found = [path for path in glob.glob("/run/**", recursive=True) if os.path.exists(path) and _is_socket(path)]
    own = {f"/run/cloister/box/{name}" for name in ("egress.sock", "llm.sock", "identity.sock", "agent.sock")}
    box.must(set(found) <= own, f"sockets in /run: {', '.join(found)}")
    for name in ("/org/freedesktop/systemd1/notify", "/run/systemd/notify", "systemd", "cloister-hostd"):
        box.connects(f"@{name}", "ECONNREFUSED EPERM EACCES", socket.AF_UNIX, socket.SOCK_STREAM, f"\0{name}")
    for name in ("NOTIFY_SOCKET", "LISTEN_FDS", "DBUS_SYSTEM_BUS_ADDRESS", "CREDENTIALS_DIRECTORY", "JOURNAL_STREAM"):
        box.must(name not in os.environ, f"not set: {name}")


def twin(box: Box) -> None:
    """The run's own way out is there."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("/run/cloister/box/egress.sock")
    box.works("the egress socket", True)


def _is_socket(path: str) -> bool:
    import stat

    return stat.S_ISSOCK(os.lstat(path).st_mode)
