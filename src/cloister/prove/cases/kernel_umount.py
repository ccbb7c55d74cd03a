"""Take a protecting mount away, so that what lies under it shows."""

from cloister.prove.inside.support import Box, syscall

ID = "kernel-umount"
TITLE = "Take a protecting mount away, so that what lies under it shows"
PROMISE = "P-033"
CLASSES = (
    27,
    5,
)
EXPECT = (
    "seccomp answers EPERM; where nested sandboxes are allowed, the kernel keeps mounts of an outer namespace locked"
)


def attack(box: Box) -> None:
    """Unmount protected paths, lazily too, and what hides the host's root."""
    for path in (box.path(".git/hooks"), box.path(".git/config"), box.path(".vscode"), "/tmp", "/proc", "/dev", "/"):
        for flags in (0, 2):
            box.refused(f"umount {path} ({flags})", "EPERM EINVAL", syscall, "umount2", path.encode(), flags)
