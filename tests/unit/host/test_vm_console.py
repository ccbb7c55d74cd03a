"""How a machine's end is told: a reference to type, the reason, the guest's last words."""

import pytest

from cloister.host.vm_console import verdict

ENDS = {
    "guest-protocol": "guest-protocol",
    "monitor-ended": "monitor-died",
    "guest-ended": "guest-ended",
    "guest-silent": "guest-silent",
    "begin-failed": "guest-failed",
    "something-new": "monitor-died",
    "": "monitor-died",
}


@pytest.mark.parametrize(("reason", "reference"), ENDS.items())
def test_every_reason_of_the_keeper_has_a_reference(reason: str, reference: str) -> None:
    """Known reasons have words of their own; one that is not known is never passed over in silence."""
    found, text = verdict({"reason": reason, "text": "what failed"})

    assert found == reference
    assert f"[{reference}]" in text
    assert "what failed" in text


CONSOLES = {
    "[    3.1] Kernel panic - not syncing: dm-verity device corrupted": "guest-corrupt",
    "[    2.0] Kernel panic - not syncing: Attempted to kill init!": "guest-panicked",
    "cloister: up": "monitor-died",
}


@pytest.mark.parametrize(("console", "reference"), CONSOLES.items())
def test_the_last_words_of_a_kernel_say_why(console: str, reference: str) -> None:
    """Corruption and panic are told apart from a monitor that just ended, by the guest's last line."""
    found, text = verdict({"reason": "monitor-ended", "console": console})

    assert found == reference
    assert console in text


def test_last_words_are_bounded() -> None:
    """A guest that prints a page gets the end of it shown, not the page."""
    assert len(verdict({"reason": "monitor-ended", "console": "x" * 10_000, "text": "y" * 10_000})[1]) < 1000


def test_a_panic_before_the_last_line_is_found() -> None:
    """A kernel that stops prints a trace behind its reason; the reason is what is told."""
    printed = (
        "up\n[ 9.0] Kernel panic - not syncing: dm-verity device corrupted\n[ 9.1] CPU: 0 PID: 7\n[ 9.2] Call Trace:\n"
    )
    reference, text = verdict({"reason": "monitor-ended", "console": "[ 9.2] Call Trace:"}, printed)

    assert reference == "guest-corrupt"
    assert "not syncing: dm-verity device corrupted" in text
