"""Look into the host's /run."""

import os

from cloister.prove.inside.support import Box

ID = "fs-host-runtime"
TITLE = "Look into the host's /run"
PROMISE = "P-018"
CLASSES = (41, 12)
EXPECT = "/run holds the sandbox's own directory and nothing else"
SHAPE = "any"


def attack(box: Box) -> None:
    """List it, and try what is usually there."""
    names = sorted(os.listdir("/run"))
    box.must(names == ["cloister"], f"/run: {', '.join(names)}")
    for path in (
        "/run/user",
        f"/run/user/{os.getuid()}",
        "/run/dbus",
        "/run/systemd",
        "/var/run",
        "/run/secrets",
        "/run/credentials",
        "/run/lock",
        "/run/netns",
    ):
        if box.facts.get("guest") and os.path.realpath(path) == "/run":
            box.stopped(f"{path}: the guest's own /run")
            continue
        box.refused(path, "ENOENT EACCES", os.listdir, path)
