"""Give files another owner, file capabilities or trusted attributes."""

import os

from cloister.prove.inside.support import Box, scratch, write

ID = "fs-privileged-marks"
TITLE = "Give files another owner, file capabilities or trusted attributes"
PROMISE = "P-039"
CLASSES = (17, 18)
EXPECT = "EPERM without privilege"


def attack(box: Box) -> None:
    """In the workspace, whose files the host's owner uses later."""
    with scratch(box.path("marked")) as path:
        write(path, "#!/bin/sh\n")
        box.refused("chown to root", "EPERM EINVAL", os.chown, path, 0, 0) if os.getuid() else None
        box.refused("chown to another user", "EPERM EINVAL", os.chown, path, 12345, 12345)
        capability = bytes.fromhex("0100000200000020000000000000000000000000")
        box.refused(
            "security.capability", "EPERM EOPNOTSUPP EINVAL", os.setxattr, path, "security.capability", capability
        )
        box.refused("trusted attribute", "EPERM EOPNOTSUPP", os.setxattr, path, "trusted.overlay.opaque", b"y")


def twin(box: Box) -> None:
    """Modes of own files can be changed."""
    with scratch(box.path("own")) as path:
        write(path)
        os.chmod(path, 0o755)
        box.works("mode 755", os.access(path, os.X_OK))
