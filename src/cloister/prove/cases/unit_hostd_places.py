"""Hand root's daemon a directory that is not the caller's, by a descriptor."""

import contextlib
import os
import socket
import tempfile

from cloister.prove.inside.asking import asks, must_be_refused, must_start, place
from cloister.prove.inside.support import Box, in_child, syscall

ID = "unit-hostd-places"
TITLE = "Hand root's daemon a directory that is not the caller's, by a descriptor"
PROMISE = "P-295"
CLASSES = (17, 1, 3, 70)
EXPECT = "hostd walks to the directory itself, below the caller's roots and with the caller's rights"
IF_POLICY = ("unit",)
STAGES = ("attack", "still")
PROCEDURE = "from-outside"
CHECKS = ("no-unit-left", "no-mounts", "no-survivor")
LIMIT_S = 40.0


def attack(box: Box) -> None:
    """Flaws PF1, PF5, PF7: others' directories, the host's, what is no directory, and what lies behind a link."""
    must_start(box)
    here = place(box.workspace)
    foreign = ["/", "/etc", "/root", "/proc/self/root", "/proc/self/fd", "/run/cloister", "/tmp", "/dev/shm"]
    for path in (*foreign, *box.fact("host_homes"), *box.fact("unit_directories")):
        with contextlib.suppress(PermissionError, FileNotFoundError):
            there = place(str(path))
            must_be_refused(box, f"workspace {path}", asks(box, there, there))
            must_be_refused(box, f"directory {path}", asks(box, here, there))
            os.close(there)
    _kinds(box, here)
    _links(box, here)
    with contextlib.suppress(OSError):  # where users may have no namespaces
        in_child(_another_namespace, box)
        box.stopped("a directory of another mount namespace: refused")
    os.close(here)


def _kinds(box: Box, here: int) -> None:
    """Descriptors of every other kind in the place of a directory, and of the streams."""
    one, other = socket.socketpair()
    reader, writer = os.pipe()
    kinds = {"file": place(str(box.fact("writable")), 0), "socket": one.fileno(), "pipe": reader,
             "memory": os.memfd_create("evil"), "device": place("/dev/null", 0)}  # fmt: skip
    for name, descriptor in kinds.items():
        must_be_refused(box, f"workspace: {name}", asks(box, descriptor, descriptor))
        must_be_refused(box, f"directory: {name}", asks(box, here, descriptor))
    must_be_refused(box, "a stream that is a directory", asks(box, here, here, streams=(here, here, here)))
    must_be_refused(box, "a link that is no socket", asks(box, here, here, link=reader))
    one.close()
    other.close()
    os.close(writer)
    for descriptor in (kinds["file"], reader, kinds["memory"], kinds["device"]):
        os.close(descriptor)


def _links(box: Box, here: int) -> None:
    """A name below the root that leads elsewhere, and one that is gone."""
    for target in ("/etc", "/", str(box.fact("base")) + "/outside"):
        name = f"{box.fact('base')}/led-away"
        os.symlink(target, name)
        through = place(name)
        itself = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        must_be_refused(box, f"through a link to {target}", asks(box, through, here))
        must_be_refused(box, f"a link to {target} itself", asks(box, itself, itself))
        os.close(through)
        os.close(itself)
        os.unlink(name)
    gone = tempfile.mkdtemp(dir=str(box.fact("base")))
    removed = place(gone)
    os.rmdir(gone)
    must_be_refused(box, "a directory that was removed", asks(box, removed, removed))
    os.close(removed)


def _another_namespace(box: Box) -> None:
    """In a mount namespace of our own the workspace's name is another directory: hostd must not take it for ours."""
    syscall("unshare", 0x10000000 | 0x20000)  # CLONE_NEWUSER | CLONE_NEWNS
    covered = box.workspace.encode() + b"\0"
    syscall("mount", b"/etc\0", covered, b"\0", 0x1000, b"\0")  # MS_BIND
    there = place(box.workspace)
    answer = asks(box, there, there)
    if not answer.startswith(("refused", "closed")):
        os._exit(253)


def still(box: Box) -> None:
    """The run that lived meanwhile is as it was."""
    box.must(os.path.exists(box.path("README")), "the other run has its workspace")
