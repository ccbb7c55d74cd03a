"""Have root unpack something else than plain files of the caller's."""

import base64
import fcntl
import os

from cloister.prove.inside.asking import asks, must_be_refused, place
from cloister.prove.inside.support import Box

ID = "unit-hostd-carry"
TITLE = "Have root unpack something else than plain files of the caller's"
PROMISE = "P-297"
CLASSES = (17, 3, 23)
EXPECT = "root reads one kind of tar from sealed memory: no links, devices, owners or names that lead out"
IF_POLICY = ("unit",)
STAGES = ("attack", "still")
PROCEDURE = "from-outside"
CHECKS = ("no-unit-left", "nothing-beside-workspace", "no-survivor")
LIMIT_S = 40.0

SEALS = 0xF  # F_SEAL_SEAL, _SHRINK, _GROW, _WRITE (fcntl(2))
NAMES = (b"../evil", b"/etc/evil", b"a/../../evil", b"./evil", b"", b"..", b"a//b", b"evil/")
KINDS = {"hard link": b"1", "symbolic link": b"2", "character device": b"3", "block device": b"4", "pipe": b"6",
         "extension": b"x", "global extension": b"g"}  # fmt: skip

NUMBERS = {"the caller's uid": (108, b"0001750\0"), "a set-uid mode": (100, b"0004755\0"),
           "a size beyond its end": (124, b"77777777777\0"), "a negative size": (124, b"\xff" * 12)}  # fmt: skip
"""Where each stands in a header (ustar)."""


def attack(box: Box) -> None:
    """Flaws PF2 to PF4: links to root's files, names that lead out, and memory that changes while it is read."""
    honest = base64.b64decode(str(box.fact("honest_tar")))
    here = place(box.workspace)
    answer = _carried(box, here, honest)
    box.works(f"an honest tar: {answer}", answer == "started")
    for name in NAMES:
        must_be_refused(box, f"a file named {name.decode()!r}", _carried(box, here, _changed(honest, 0, name, 100)))
    for what, kind in KINDS.items():
        led = _changed(honest, 157, b"/etc/shadow", 100)
        must_be_refused(box, f"a {what}", _carried(box, here, _changed(led, 156, kind, 1)))
    for what, (at, value) in NUMBERS.items():
        must_be_refused(box, what, _carried(box, here, _changed(honest, at, value, len(value))))
    must_be_refused(box, "no tar", _carried(box, here, b"x" * 1024))
    must_be_refused(box, "half a tar", _carried(box, here, honest[:700]))
    must_be_refused(box, "a file twice", _carried(box, here, honest[:1024] + honest))
    must_be_refused(box, "unsealed memory", _carried(box, here, honest, seals=0))
    secret = os.open(str(box.fact("secret")), os.O_RDONLY)
    must_be_refused(box, "a file on disk", asks(box, here, here, carry=secret))
    must_be_refused(box, "a directory", asks(box, here, here, carry=here))
    os.close(secret)
    os.close(here)


def _carried(box: Box, here: int, data: bytes, seals: int = SEALS) -> str:
    memory = os.memfd_create("carry", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.write(memory, data)
    if seals:
        fcntl.fcntl(memory, 1033, seals)  # F_ADD_SEALS
    try:
        return asks(box, here, here, carry=memory)
    finally:
        os.close(memory)


def _changed(tar: bytes, at: int, value: bytes, size: int) -> bytes:
    """Return a tar with other bytes in its first header, and the checksum that goes with them."""
    head = bytearray(tar[:512])
    head[at : at + size] = value.ljust(size, b"\0")[:size]
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + tar[512:]


def still(box: Box) -> None:
    """The run that lived meanwhile is as it was."""
    box.must(os.path.exists(box.path("README")), "the other run has its workspace")
