"""Use the kernel's keyrings, which users share across namespaces."""

from cloister.prove.inside.support import Box, syscall

ID = "kernel-keyring"
TITLE = "Use the kernel's keyrings, which users share across namespaces"
PROMISE = "P-035"
CLASSES = (
    28,
    44,
)
EXPECT = "seccomp answers EPERM"
SHAPE = "any"


def attack(box: Box) -> None:
    """Add a key, ask for one, list and join keyrings."""
    for ring in (-2, -3, -4, -5):
        box.refused(f"add_key to {ring}", "EPERM", syscall, "add_key", b"user", b"cloister-prove", b"x", 1, ring)
        box.refused(f"keyctl read {ring}", "EPERM", syscall, "keyctl", 11, ring, 0, 0, 0)
    box.refused("request_key", "EPERM", syscall, "request_key", b"user", b"cloister-prove", b"", -4)
    box.refused("join session keyring", "EPERM", syscall, "keyctl", 1, 0, 0, 0, 0)
