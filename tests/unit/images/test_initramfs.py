"""The initramfs: an archive that the kernel and cpio(1) read, the same for the same entries."""

from __future__ import annotations

import pytest

from cloister.images.initramfs import Entry, Module, guest_entries, modules_of, newc, read

MODULES = [
    Module("first.ko", b"\x7fELF1"), Module("second.ko", b"\x7fELF22", optional=True),
    Module("net.ko", b"\x7fELF", device=1),
]  # fmt: skip


def test_what_is_written_is_read_again() -> None:
    """Names, modes, contents of any length and devices come back as they were, in their order."""
    entries = [Entry("dev", 0o755), Entry("dev/console", 0o600, device=(5, 1))]
    entries += [Entry(f"file{size}", 0o644, data=b"x" * size) for size in (0, 1, 2, 3, 4, 5, 4096)]
    assert read(newc(entries)) == entries


def test_the_same_entries_give_the_same_bytes() -> None:
    """Nothing of the machine or the moment gets in."""
    assert newc(guest_entries(b"shim", MODULES)) == newc(guest_entries(b"shim", MODULES))
    assert len(newc([])) % 512 == 0


def test_a_guest_gets_its_program_and_its_modules() -> None:
    """Our program is /init; the list names the modules in order, which may be refused, and for which device."""
    entries = {entry.name: entry for entry in guest_entries(b"shim", MODULES)}
    assert entries["init"].data == b"shim"
    assert entries["init"].mode == 0o755
    assert entries["modules.list"].data == b"/modules/first.ko\n?/modules/second.ko\n@1 /modules/net.ko\n"
    assert modules_of(newc(guest_entries(b"shim", MODULES))) == MODULES


@pytest.mark.parametrize(
    "entries",
    [
        [Entry("/absolute", 0o644, data=b"")], [Entry("a/../b", 0o644, data=b"")], [Entry("", 0o755)],
        [Entry("a", 0o755), Entry("a", 0o755)], [Entry("late/child", 0o644, data=b"")], [Entry("TRAILER!!!", 0o755)],
        [Entry("a", 0o4755, data=b"")], [Entry("a\n", 0o644, data=b"")],
    ],
)  # fmt: skip
def test_entries_that_the_kernel_would_misread_are_refused(entries: list[Entry]) -> None:
    """Paths that lead elsewhere, doubles, children without a directory and set-uid bits are mistakes."""
    with pytest.raises(ValueError, match=r"\w"):
        newc(entries)
