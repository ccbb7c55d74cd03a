"""Kill the program that the user started, so that the sandbox lives on alone."""

import socket

from cloister.prove.inside.support import Box

ID = "open-kill-client"
TITLE = "Kill the program that the user started, so that the sandbox lives on alone"
PROMISE = "P-066"
CLASSES = (86, 36)
EXPECT = "the run ends with it"
PROCEDURE = "kill-client"
CHECKS = ("no-survivor", "runtime-empty", "no-mounts")
STAGES = ("attack", "after")


def attack(box: Box) -> None:
    """Before: there is no direct way."""
    box.connects(
        "direct",
        "ECONNREFUSED ENETUNREACH",
        socket.AF_INET,
        socket.SOCK_STREAM,
        ("127.0.0.1", int(box.fact("tcp_port"))),
    )


def after(box: Box) -> None:
    """After: there is none either, for as long as this still runs."""
    attack(box)
