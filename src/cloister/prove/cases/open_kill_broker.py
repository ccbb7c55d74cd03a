"""Kill the broker and its proxy while the agent runs."""

import socket

from cloister.prove.inside.support import Box

ID = "open-kill-broker"
TITLE = "Kill the broker and its proxy while the agent runs"
PROMISE = "P-059"
CLASSES = (86,)
EXPECT = "the run ends; nothing goes direct"
PROCEDURE = "kill-broker"
CHECKS = ("no-survivor", "no-mounts")
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
