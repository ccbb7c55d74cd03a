"""How much a guest's disks may move, as both monitors are told it."""

import msgspec

from cloister.isolation.qemu import Machine, qemu_argv

MACHINE = Machine(
    program="/usr/bin/qemu", accelerator="tcg", memory_mib=256, cpus=1, cmdline="x",
    files={"kernel": 5, "initramfs": 6, "root": 7, "var": 8},
)  # fmt: skip


def test_qemu_is_told_a_rate_for_each_disk() -> None:
    """With a rate each disk gets a bucket of its own and the guest sees only what is behind it; without, none."""
    plain = " ".join(qemu_argv(MACHINE))
    slowed = " ".join(qemu_argv(msgspec.structs.replace(MACHINE, disk_rate=1 << 20)))

    assert "throttle" not in plain
    assert "virtio-blk-device,drive=var,discard=off,write-zeroes=off " in plain
    for role, only in (("root", "on"), ("var", "off")):
        assert f"-object throttle-group,id={role}-rate,x-bps-total=1048576 " in slowed
        assert (
            f"driver=throttle,node-name={role}-slowed,throttle-group={role}-rate,file={role},read-only={only}" in slowed
        )
        assert f"virtio-blk-device,drive={role}-slowed," in slowed
        assert f"virtio-blk-device,drive={role}," not in slowed
