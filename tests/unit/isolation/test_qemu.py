"""QEMU's argv: what a guest gets, and everything it does not get."""

from __future__ import annotations

import itertools

import pytest

from cloister.isolation.qemu import Machine, clock_khz, command_line, probe_argv, qemu_argv

FILES = {"kernel": 5, "initramfs": 6, "root": 7, "var": 8, "workspace": 9}
TEMPLATE = "console=ttyS0 quiet panic=-1 cloister.verity={verity} {clock}"


def machine(**changed: object) -> Machine:
    """Return a machine."""
    fields: dict[str, object] = {
        "program": "/usr/bin/qemu-system-x86_64", "accelerator": "tcg", "memory_mib": 512, "cpus": 2, "files": FILES,
        "cmdline": "console=ttyS0",
    }  # fmt: skip
    return Machine(**{**fields, **changed})  # type: ignore[arg-type]


def pairs(argv: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return each option with its value; those without one have the next option there."""
    return list(itertools.pairwise(argv))


def test_disks_come_in_the_guests_order_and_only_the_root_is_read_only() -> None:
    """The disks vda, vdb, vdc are root, var and workspace; nothing writes the root, or opens a path."""
    argv = qemu_argv(machine())
    devices = [value for option, value in pairs(argv) if option == "-device" and value.startswith("virtio-blk")]
    assert devices == [
        f"virtio-blk-device,drive={role},discard=off,write-zeroes=off" for role in ("root", "var", "workspace")
    ]
    for _, value in (pair for pair in pairs(argv) if pair[0] == "-blockdev"):
        assert ("read-only=on" in value) == ("node-name=root" in value)
        assert "auto-read-only=off" in value
    assert not any(word.startswith("/") and not word.startswith("/proc/self/fd/") for word in argv[1:])


def test_a_disk_that_is_not_there_is_not_asked_for() -> None:
    """A machine of the tests, or a template, may have the root alone."""
    argv = qemu_argv(machine(files={"kernel": 5, "initramfs": 6, "root": 7}))
    assert "drive=var" not in " ".join(argv)


def test_nothing_comes_by_default() -> None:
    """No default devices, no configuration of the user's, no network, no control socket, and QEMU's own filter on."""
    argv = qemu_argv(machine())
    for option in ("-nodefaults", "-no-user-config", "-no-reboot"):
        assert option in argv
    assert ("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny") in pairs(argv)
    assert "auto-kernel-cmdline=off" in argv[argv.index("-M") + 1]
    for option in ("-netdev", "-qmp", "-mon", "-incoming", "-vnc", "-net", "-nic", "-virtfs", "-fsdev", "-usb"):
        assert option not in argv


def test_a_tap_is_a_descriptor_and_has_the_runs_address() -> None:
    """With a bridge the card has the address that the packet filter knows, and QEMU opens no device."""
    argv = " ".join(qemu_argv(machine(tap_fd=12, mac="02:00:00:00:00:07")))
    assert "-netdev tap,id=net,fd=12 -device virtio-net-device,netdev=net,mac=02:00:00:00:00:07," in argv
    for feature in ("csum", "gso", "guest_tso4", "mrg_rxbuf", "ctrl_vq"):
        assert f",{feature}=off" in argv, "no feature that is not needed is offered to a guest"


def test_a_templates_card_is_that_of_a_tap_and_leads_nowhere() -> None:
    """What becomes a template has the card that its runs will have, on a wire of its own with nobody at the end."""
    made = qemu_argv(machine(memory_fd=30, shared=True, mac="52:54:00:00:00:00"))
    taken = qemu_argv(machine(memory_fd=30, shared=True, mac="52:54:00:00:00:00", tap_fd=12))
    assert "hubport,id=net,hubid=0" in made
    assert [word for word in taken if word not in made] == ["tap,id=net,fd=12"]


@pytest.mark.parametrize(("accelerator", "cpu"), [("kvm", "host,vmx=off,svm=off"), ("tcg", "max,cx16=off")])
def test_the_processor_is_the_accelerators(accelerator: str, cpu: str) -> None:
    """KVM shows the host's processor without guests of its own, emulation all that QEMU has, in bounded memory."""
    argv = qemu_argv(machine(accelerator=accelerator))
    assert ("-cpu", cpu) in pairs(argv)
    assert argv[argv.index("-accel") + 1].startswith(accelerator)
    assert ("tb-size=" in argv[argv.index("-accel") + 1]) == (accelerator == "tcg")


def test_a_template_and_what_starts_from_it_differ_only_in_who_writes_memory() -> None:
    """A snapshot is taken up by the machine that it was made of: same devices, memory shared or not."""
    made = qemu_argv(machine(memory_fd=30, shared=True))
    taken = qemu_argv(machine(memory_fd=30, orders_fd=31, incoming=True))
    assert [word for word in taken if word not in made] == [
        "memory-backend-file,id=memory,size=512M,mem-path=/proc/self/fd/30,share=off",
        "socket,id=orders,fd=31", "-mon", "chardev=orders,mode=control", "-incoming", "defer",
    ]  # fmt: skip
    for argv in (made, taken, qemu_argv(machine())):
        (balloon,) = [word for word in argv if word.startswith("virtio-balloon-device")]
        assert "free-page-reporting=on" in balloon
        assert "page-poison=off" in balloon, "a guest that wants its free pages empty must not report them"


def test_the_clock_is_told_where_it_cannot_be_measured() -> None:
    """An emulated guest is told the rate of the counter it sees; with KVM the word is left out, with no gap."""
    line = command_line(TEMPLATE, verity="1:2:3:4", clock_khz=2596120)
    assert line == "console=ttyS0 quiet panic=-1 cloister.verity=1:2:3:4 tsc_early_khz=2596120 tsc=reliable"
    assert command_line(TEMPLATE, verity="1:2:3:4", clock_khz=0).endswith("cloister.verity=1:2:3:4")


@pytest.mark.parametrize(
    ("cpuinfo", "khz"),
    [
        ("processor\t: 0\nbogomips\t: 5192.24\n", 2596120), ("", 0), ("bogomips: x\n", 0), ("bogomips\t: -1\n", 0),
        ("bogomips\t: inf\n", 0), ("BogoMIPS\t: 48.00\n", 0),
    ],
)  # fmt: skip
def test_the_rate_is_half_the_bogomips(cpuinfo: str, khz: int) -> None:
    """Bogomips are twice the rate in MHz; a host that says none, or nonsense, gives no clock."""
    assert clock_khz(cpuinfo) == khz


def test_a_probe_has_neither_disk_nor_channel() -> None:
    """The guest that only says hello gets a console and nothing else."""
    argv = probe_argv("/usr/bin/qemu", "kvm", "/i/vmlinux", "/i/initramfs.cpio", clock=0)
    assert ("-append", "console=ttyS0 quiet reboot=t panic=-1 cryptomgr.notests cloister.probe") in pairs(argv)
    assert not {"-blockdev", "-drive", "-device", "-netdev", "-qmp", "-add-fd"} & set(argv)
    assert "-sandbox" in argv
