"""Reach the state, home or uid of another account of the system."""

import os

from cloister.prove.inside.support import Box, in_child, write

ID = "unit-accounts"
TITLE = "Reach the state, home or uid of another account of the system"
PROMISE = "P-290"
CLASSES = (17, 63)
EXPECT = "a uid of its own, no group but its own, and none of the system's directories in sight"
SHAPE = "any"
IF_POLICY = ("unit",)

OWN = range(1_900_000_000, 1_900_065_536)
"""Uids of agents (`plan/unit.py`)."""


def attack(box: Box) -> None:
    """By identity, by path, and by what is left open."""
    mine = os.getresuid()
    box.must(len({*mine}) == 1 and mine[0] in OWN, f"uid {mine[0]}: one of the agents'")
    box.must(mine[0] != int(box.fact("caller_uid")), "not the caller's uid")
    box.must(set(os.getgroups()) <= {mine[0]}, f"groups {os.getgroups()}")
    others = [(str(name), int(uid)) for name, uid in box.fact("accounts") if int(uid) != mine[0]]
    for name, uid in (*others, ("the caller", int(box.fact("caller_uid"))), ("root", 0)):
        box.refused(f"become {name}", "EPERM EINVAL", in_child, os.setresuid, uid, uid, uid)
        box.refused(f"the group of {name}", "EPERM EINVAL", in_child, os.setgroups, [uid])
    for folder in box.fact("unit_directories"):
        box.refused(str(folder), "ENOENT EACCES", os.listdir, str(folder))
        box.refused(f"write {folder}", "ENOENT EACCES EROFS", write, f"{folder}/evil")
    for name, _ in others:
        for path in (f"/home/{name}", f"/var/lib/cloister/agents/{name}", f"/proc/1/root/home/{name}"):
            box.refused(path, "ENOENT EACCES ESRCH", os.listdir, path)
    given = box.path("given-away")
    write(given)
    box.refused("give a file to root", "EPERM EINVAL", os.chown, given, 0, 0)
    box.refused("give it to the caller", "EPERM EINVAL", os.chown, given, int(box.fact("caller_uid")), -1)
    os.unlink(given)


def twin(box: Box) -> None:
    """What it makes in the workspace is its own to change, and the home is writable."""
    path = box.path("made-here")
    write(path)
    os.chmod(path, 0o640)
    box.works("its own file", os.stat(path).st_uid == os.getuid())
    os.unlink(path)
    box.works("the home", os.access(box.home, os.W_OK))
