"""Type into a terminal with TIOCSTI, TIOCLINUX, and with high bits set."""

import fcntl
import os
import pty
import signal
import termios

from cloister.prove.inside.support import Box, syscall

ID = "tty-own-injection"
TITLE = "Type into a terminal with TIOCSTI, TIOCLINUX, and with high bits set"
PROMISE = "P-038"
CLASSES = (38,)
EXPECT = "seccomp answers EPERM, whatever the upper half of the argument"
SHAPE = "any"


def attack(box: Box) -> None:
    """On an own terminal, where it would be allowed without the filter."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # comes when the terminal is closed at the end
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for name, number in (("TIOCSTI", 0x5412), ("TIOCLINUX", 0x541C), ("TIOCSETD", 0x5423)):
        for high in (0, 1 << 32, 0xFFFFFFFF << 32):
            value = number | high
            box.refused(
                f"{name} {value:#x}",
                "EPERM",
                syscall,
                "ioctl",
                terminal,
                value - (1 << 64) if value >> 63 else value,
                b"i",
            )
    os.close(terminal)
    os.close(controller)


def twin(box: Box) -> None:
    """Ordinary terminal calls work."""
    controller, terminal = pty.openpty()
    box.works("attributes", len(termios.tcgetattr(terminal)) == 7)
    os.close(terminal)
    os.close(controller)
