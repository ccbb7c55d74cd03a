"""Speak to root's daemon as somebody else, for somebody else's run, or in words of another kind."""

import os

from cloister.prove.inside.asking import asks, connected, frame, must_be_refused, must_start, packed, place, said
from cloister.prove.inside.support import Box

ID = "unit-hostd-words"
TITLE = "Speak to root's daemon as somebody else, for somebody else's run, or in words of another kind"
PROMISE = "P-296"
CLASSES = (70, 73, 74, 75, 76)
EXPECT = "who asks is the kernel's word; names are of one narrow kind; runs are ended by the broker and root alone"
IF_POLICY = ("unit",)
STAGES = ("attack", "still")
PROCEDURE = "from-outside"
CHECKS = ("no-unit-left", "no-survivor")
LIMIT_S = 40.0

NAMES = ("", "../sh", "sh/..", "sh\n", "-sh", "--", "%i", "%n", "$(id)", "sh\0root", "a" * 300, "sh bob", "*",
         "cl-sh-bob", "\u202esh")  # fmt: skip
FIELDS = ("caller=root", "caller_uid=0", "uid=0", "user=root", "account=root", "account_uid=0", "home=/root",
          "root=/", "directory=/etc", "property=User=root", "unit=ssh.service", "verb=run\nverb=end")  # fmt: skip


def attack(box: Box) -> None:
    """Flaw PF1 and its kin: fields that name a user, names that are options, verbs that are not ours, broken frames."""
    must_start(box)
    here = place(box.workspace)
    for name in NAMES:
        must_be_refused(box, f"agent {name[:20]!r}", asks(box, here, here, fields={"agent": name}))
        if name:
            must_be_refused(box, f"profile {name[:20]!r}", asks(box, here, here, fields={"profile": name}))
            must_be_refused(box, f"run {name[:20]!r}", asks(box, here, here, fields={"run": name}))
    for field in FIELDS:
        name, _, value = field.partition("=")
        must_be_refused(box, f"field {field!r}", asks(box, here, here, fields={name: value}))
    os.close(here)
    living = str(box.fact("living_run"))
    for verb, more in (("end", f"run={living}"), ("recover", "living="), ("exec", f"run={living}"), ("apply", "x=y")):
        fields = packed([f"verb={verb}".encode(), more.encode()])
        must_be_refused(box, f"{verb} of a living run", _sends(box, frame("L", fields)))
    for what, data in _BROKEN.items():
        must_be_refused(box, what, _sends(box, data))


_BROKEN = {
    "a frame of 4 GB": b"\xff\xff\xff\xffL",
    "a list that points beyond its frame": frame("L", b"\xff\xff\xff\x7f"),
    "a frame of the broker's": frame("P", b"{}"),
    "the broker's word that a unit stands": frame("S", b"{}"),
    "text": b"GET / HTTP/1.1\r\nHost: cloister-hostd\r\n\r\n",
    "fields twice": frame("L", packed([b"verb=run", b"verb=end"])),
    "half a frame": b"\x10",
}


def _sends(box: Box, data: bytes) -> str:
    """Send bytes, and no more; return what came of it."""
    import socket

    with connected(box) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return said(connection)


def still(box: Box) -> None:
    """The run that they named is as it was."""
    box.must(os.path.exists(box.path("README")), "the other run lives")
