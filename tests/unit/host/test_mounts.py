"""mountinfo and cgroup texts are read as the kernel writes them."""

from __future__ import annotations

from cloister.host.mounts import cgroup_of, mounts, proc_masks

UNIFIED = "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
HYBRID = (
    "31 30 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "41 30 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)
DOCKER = (
    "600 590 0:60 / /proc rw,nosuid - proc proc rw\n"
    "610 600 0:60 /bus /proc/bus ro,nosuid - proc proc rw\n"
    "611 600 0:61 / /proc/acpi ro,relatime - tmpfs tmpfs ro\n"
    "612 600 0:62 /null /proc/kcore rw,nosuid - tmpfs tmpfs rw\n"
)


def test_fields_and_escapes():
    """Optional fields are skipped, and a blank in a mount point is a blank."""
    text = "36 35 98:0 /a\\040b /mnt\\0402 rw master:1 shared:2 - ext4 /dev/x rw\nnot a mount\n"
    assert mounts(text) == [("/a b", "/mnt 2", "ext4")]


def test_a_container_with_masks():
    """The covers Docker lays over /proc are found."""
    assert proc_masks(DOCKER) == ("/proc/acpi", "/proc/bus", "/proc/kcore")


def test_a_plain_host_has_no_masks():
    """binfmt_misc lies on an empty directory made for it and hides nothing."""
    text = "1 0 0:5 / /proc rw - proc proc rw\n2 1 0:6 / /proc/sys/fs/binfmt_misc rw - autofs systemd-1 rw\n"
    assert proc_masks(text) == ()


def test_unified_layout():
    """Our cgroup's directory is the mount point and the path of /proc/self/cgroup."""
    found = cgroup_of(UNIFIED, "0::/user.slice/user-1000.slice/session-3.scope\n")
    assert (found.layout, found.path) == ("unified", "/sys/fs/cgroup/user.slice/user-1000.slice/session-3.scope")


def test_the_root_of_a_cgroup_namespace():
    """In a container our cgroup is / and the directory is the mount point itself."""
    assert cgroup_of(UNIFIED, "0::/\n").path == "/sys/fs/cgroup"


def test_hybrid_and_legacy_layouts():
    """A v2 tree beside v1 trees is hybrid; v1 alone is legacy; nothing mounted is none."""
    assert cgroup_of(HYBRID, "4:memory:/a\n0::/\n").layout == "hybrid"
    assert cgroup_of(HYBRID.splitlines()[0], "4:memory:/a\n").layout == "legacy"
    assert cgroup_of("", "0::/\n").layout == "none"


def test_a_cgroup_outside_of_the_mount_has_no_path():
    """A path that leaves the namespace, or lies outside of a bind mount, is not made up."""
    assert cgroup_of(UNIFIED, "0::/../other\n").path == ""
    assert cgroup_of(UNIFIED, "0::/..\n").path == ""
    assert cgroup_of(UNIFIED.replace(" / ", " /docker/x ", 1), "0::/user.slice\n").path == ""


def test_a_bind_mounted_cgroup():
    """Where exactly our own cgroup is mounted, its directory is the mount point."""
    assert cgroup_of(UNIFIED.replace(" / ", " /docker/x ", 1), "0::/docker/x\n").path == "/sys/fs/cgroup"
