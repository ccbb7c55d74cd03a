"""Whatever stands in /proc/self/mountinfo, reading it does not fail, and paths stay below the mount."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cloister.host.mounts import cgroup_of, mounts, proc_masks

paths = st.text("ab/.\\ 040é\udc80", max_size=12).map(lambda text: "/" + text)
lines = st.builds(
    "{} {} 0:1 {} {} rw {} - {} x rw".format,
    st.integers(0, 9),
    st.integers(0, 9),
    paths,
    paths,
    st.sampled_from(["", "shared:1", "master:1 shared:2"]),
    st.sampled_from(["cgroup", "cgroup2", "proc", "ext4"]),
) | st.text(max_size=40)


@given(st.lists(lines, max_size=6).map("\n".join), paths)
def test_any_text_is_read(mountinfo, own):
    """No text crashes the readers, and a cgroup path never leaves its mount by dots."""
    found = cgroup_of(mountinfo, f"1:name=systemd:/x\n0::{own}\n")
    points = [mount.point.rstrip("/") for mount in mounts(mountinfo)]
    assert not found.path or any(found.path.startswith(point) for point in points)
    assert "/../" not in f"{found.path.removeprefix(next(iter(points), ''))}/" or "/../" in mountinfo
    assert all(mask.startswith("/proc/") for mask in proc_masks(mountinfo))
