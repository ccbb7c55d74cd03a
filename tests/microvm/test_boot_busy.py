"""Guests boot while the host has more to do than it can."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support import guest_machine
from support.guest_link import GuestLink
from support.guest_machine import GuestMachine, line

BUSY = 4


@pytest.mark.slow
def test_a_busy_host_boots_guests(image) -> None:
    """With four loops on every two processors an emulated guest comes up, since it is told the rate of its clock.

    Without the word the kernel may fail to measure it, and then hangs for ever: in none of eight boots it came up.
    """
    booted = guest_machine.of(image)
    assert "tsc_early_khz=" in line(booted)
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(BUSY)]
    try:
        for _ in range(2):
            with GuestMachine(booted, line(booted)) as machine:
                assert GuestLink(machine.channel).join()["kernel"]
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
