"""Look for what a quiet run leaves on the host."""

from cloister.prove.inside.support import Box, append

ID = "open-nothing-left"
TITLE = "Look for what a quiet run leaves on the host"
PROMISE = "P-024"
CLASSES = (36, 6)
EXPECT = "no placeholder, process, mount, socket or directory"
FRESH = True
CHECKS = ("no-placeholders", "no-survivor", "runtime-empty", "no-mounts")


def attack(box: Box) -> None:
    """Do a little ordinary work."""
    append(box.path("README"), "work\n")
    box.stopped("worked; the host is looked at afterwards")
