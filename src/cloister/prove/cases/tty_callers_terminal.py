"""Type a command into the terminal from which the user started the agent."""

import os

from cloister.prove.inside.support import Box, syscall

ID = "tty-callers-terminal"
TITLE = "Type a command into the terminal from which the user started the agent"
PROMISE = "P-038"
CLASSES = (38,)
EXPECT = "the sandbox has a terminal of its own, and TIOCSTI is refused"
PROCEDURE = "terminal"


def attack(box: Box) -> None:
    """Through each standard stream and /dev/tty; the host looks whether anything was typed."""
    handles = [0, 1, 2]
    try:
        handles.append(os.open("/dev/tty", os.O_RDWR))
    except OSError as error:
        box.stopped(f"/dev/tty: {error.strerror}")
    for handle in handles:
        for letter in (b"i", b"d", b"\n"):
            for number in (0x5412, 0x5412 | 1 << 32):
                box.refused(f"TIOCSTI on {handle}", "EPERM ENOTTY", syscall, "ioctl", handle, number, letter)
    box.must(os.isatty(0), "standard input is a terminal")
