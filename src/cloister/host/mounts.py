"""Read /proc/self/mountinfo and /proc/self/cgroup as text: pure functions, no file is opened here.

Formats: proc(5) (mountinfo has optional fields before a lone dash), cgroups(7).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from cloister.plan.facts import Cgroup

# Mounts below /proc that hide nothing: the kernel ignores them too, as they lie on empty directories.
HARMLESS_BELOW_PROC = ("/proc/sys/fs/binfmt_misc", "/proc/fs/nfsd")


class Mount(NamedTuple):
    """One mount: what of the file system is mounted (`root`), where (`point`), and its type."""

    root: str
    point: str
    kind: str


def mounts(mountinfo: str) -> list[Mount]:
    """Return the mounts in the text of mountinfo; octal escapes of blanks and backslashes undone."""
    found = []
    for line in mountinfo.splitlines():
        left, separator, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if separator and len(fields) > 4 and kind:  # noqa: PLR2004  the fifth field is the mount point
            found.append(Mount(_unescaped(fields[3]), _unescaped(fields[4]), kind[0]))
    return found


def proc_masks(mountinfo: str) -> tuple[str, ...]:
    """Return the mount points that cover parts of /proc.

    With any of them the kernel refuses a fresh procfs in a user namespace, unless another one
    without masks is visible (fs/namespace.c, mount_too_revealing).
    """
    points = {mount.point for mount in mounts(mountinfo)}
    return tuple(sorted(point for point in points if point.startswith("/proc/") and point not in HARMLESS_BELOW_PROC))


def cgroup_of(mountinfo: str, cgroup: str) -> Cgroup:
    """Return layout and path of our cgroup; what may be done there is for the prober to look."""
    kinds = [mount for mount in mounts(mountinfo) if mount.kind in {"cgroup", "cgroup2"}]
    unified = next((mount for mount in kinds if mount.kind == "cgroup2"), None)
    own = next((line[3:] for line in cgroup.splitlines() if line.startswith("0::")), None)
    if unified is None or own is None:
        return Cgroup(layout="legacy" if kinds else "none")
    layout: Literal["hybrid", "unified"] = "hybrid" if any(mount.kind == "cgroup" for mount in kinds) else "unified"
    if unified.root == own:
        inside = ""
    elif unified.root == "/":
        inside = own.rstrip("/")
    else:
        return Cgroup(layout=layout)  # our cgroup lies outside of what is mounted
    if "/../" in f"{inside}/":
        return Cgroup(layout=layout)  # outside of the cgroup namespace
    return Cgroup(layout=layout, path=unified.point.rstrip("/") + inside)


def _unescaped(field: str) -> str:
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, char)
    return field
