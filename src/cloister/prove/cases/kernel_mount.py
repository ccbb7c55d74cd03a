"""Mount a file system, bind, remount."""

import os

from cloister.prove.inside.support import Box, syscall

ID = "kernel-mount"
TITLE = "Mount a file system, bind, remount"
PROMISE = "P-033"
CLASSES = (27,)
EXPECT = "seccomp answers EPERM, old and new interface"
LIFTED_BY = ("hardening.nested",)


def attack(box: Box) -> None:
    """Mount a tmpfs and an overlay, bind the root, make what is read-only writable."""
    target = box.path("mnt-attack")
    os.makedirs(target, exist_ok=True)
    where = target.encode()
    try:
        box.refused("mount tmpfs", "EPERM", syscall, "mount", b"none", where, b"tmpfs", 0, b"")
        box.refused("mount proc", "EPERM", syscall, "mount", b"proc", where, b"proc", 0, b"")
        box.refused("bind /", "EPERM", syscall, "mount", b"/", where, b"", 4096 | 16384, b"")
        box.refused("remount /usr writable", "EPERM", syscall, "mount", b"", b"/usr", b"", 32 | 4096, b"")
        box.refused("make / shared", "EPERM", syscall, "mount", b"", b"/", b"", 1 << 20, b"")
        box.refused("fsopen", "EPERM", syscall, "fsopen", b"tmpfs", 0)
        box.refused("open_tree clone of /", "EPERM", syscall, "open_tree", -100, b"/", 1)
        box.refused("move_mount", "EPERM", syscall, "move_mount", -100, b"/usr", -100, where, 0)
        box.refused("mount_setattr", "EPERM", syscall, "mount_setattr", -100, b"/usr", 0, bytes(32), 32)
    finally:
        os.rmdir(target)
