"""The jailer's argv and its chroot: nothing runs as root, nothing is read otherwise than it is meant."""

import msgspec
import pytest

from cloister.errors import UnsupportedError
from cloister.isolation import firecracker
from cloister.isolation.firecracker_jailer import Jailed, chroot, jailer_argv, pid_file, place, placed
from cloister.plan.vm import VmFile, VmLaunch

JAILED = Jailed(
    jailer="/usr/bin/jailer",
    firecracker="/usr/bin/firecracker",
    run="1m7yp26v5chb",
    uid=200001,
    gid=200001,
    base="/var/lib/cloister/jail",
    parent_cgroup="cloister.slice/vm",
    cgroups=(("memory.max", "536870912"), ("cpu.max", "150000 100000")),
    netns="/run/netns/a",
    file_bytes=1 << 33,
)
LAUNCH = VmLaunch(
    image="dev", version=1, manifest="", monitor="firecracker", accelerator="kvm", memory_mib=512, cpus=1,
    files=(
        VmFile(role="kernel", path="/i/vmlinux"),
        VmFile(role="initramfs", path="/i/initramfs.cpio"),
        VmFile(role="root", path="/i/root.img"),
        VmFile(role="var", path="/s/var.img", write=True),
    ),
    fields=(), inner=(), directory="/x", disk_bytes=1,
)  # fmt: skip


def test_its_argv() -> None:
    """Every part of the jail is named: user, chroot, cgroup v2 with its limits, network and PID namespace."""
    assert jailer_argv(JAILED) == (
        "/usr/bin/jailer", "--id", "1m7yp26v5chb", "--exec-file", "/usr/bin/firecracker", "--uid", "200001",
        "--gid", "200001", "--chroot-base-dir", "/var/lib/cloister/jail", "--cgroup-version", "2",
        "--parent-cgroup", "cloister.slice/vm", "--cgroup", "memory.max=536870912", "--cgroup",
        "cpu.max=150000 100000", "--netns", "/run/netns/a", "--resource-limit", "no-file=1024",
        "--resource-limit", "fsize=8589934592", "--new-pid-ns", "--", "--api-sock", "/api.sock",
    )  # fmt: skip
    plain = jailer_argv(msgspec.structs.replace(JAILED, netns="", cgroups=(), file_bytes=0))
    assert not {"--netns", "--cgroup", "fsize=0"} & set(plain)


@pytest.mark.parametrize("number", [0, -1, 2**32 - 1])
def test_never_root(number: int) -> None:
    """A jail whose user is root, or nobody at all, cannot be written down."""
    for field in ("uid", "gid"):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert({**msgspec.to_builtins(JAILED), field: number}, Jailed)
    assert msgspec.convert(msgspec.to_builtins(JAILED), Jailed) == JAILED


@pytest.mark.parametrize(
    "changed",
    [
        {"run": "a/../b"},
        {"run": "a" * 65},
        {"firecracker": "/usr/bin/qemu"},
        {"firecracker": "firecracker"},
        {"jailer": "/usr/bin/../bin/jailer"},
        {"base": "jail"},
        {"base": "/var/lib/../../etc"},
        {"netns": "net"},
        {"parent_cgroup": ""},
        {"parent_cgroup": "/"},
        {"parent_cgroup": "a/../../b"},
        {"parent_cgroup": "--daemonize"},
        {"cgroups": (("memory.max", "1=2"),)},
        {"cgroups": (("../memory.max", "1"),)},
        {"cgroups": (("memory.max", ""),)},
    ],
)
def test_what_the_jailer_would_read_otherwise(changed: dict[str, object]) -> None:
    """Names that are another option, another place or another setting are refused."""
    with pytest.raises(UnsupportedError):
        jailer_argv(msgspec.structs.replace(JAILED, **changed))


def test_its_chroot() -> None:
    """Read-once files are copied, disks linked; all paths that Firecracker is told are relative to the chroot."""
    assert chroot(JAILED) == "/var/lib/cloister/jail/firecracker/1m7yp26v5chb/root"
    assert pid_file(JAILED) == "/var/lib/cloister/jail/firecracker/1m7yp26v5chb/root/firecracker.pid"
    assert [(one.name, one.how, one.write) for one in placed(LAUNCH)] == [
        ("vmlinux", "copy", False),
        ("initramfs.cpio", "copy", False),
        ("root.img", "link", False),
        ("var.img", "link", True),
    ]
    bodies = b"".join(
        request.body
        for request in firecracker.start_requests(LAUNCH, firecracker.Machine(cmdline="x"), place(LAUNCH), (1, 16, 1))
    )
    for path in (b'"/vmlinux"', b'"/initramfs.cpio"', b'"/root.img"', b'"/var.img"', b'"/vsock.sock"'):
        assert path in bodies
    assert b"/proc/self/fd" not in bodies
    assert b"/i/" not in bodies
