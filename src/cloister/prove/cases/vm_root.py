"""Change the guest's verified root."""

import os

from cloister.prove.inside.support import Box, read

ID = "vm-root"
TITLE = "Change the guest's verified root"
PROMISE = "P-850"
CLASSES = (3, 74)
EXPECT = "it is read-only below dm-verity, and nothing can be mounted over it"
SHAPE = "any"
IF_POLICY = ("microvm",)


def attack(box: Box) -> None:
    """Write where programs come from; look at what is mounted."""
    for path in ("/", "/usr", "/usr/bin", "/usr/lib", "/usr/local/bin", "/opt", "/etc", "/run/cloister"):
        if os.path.isdir(path):
            box.refused(path, "EROFS EACCES EPERM", os.mkdir, f"{path}/cloister-prove")
    box.refused("/bin/sh", "EROFS EACCES EPERM ETXTBSY", os.open, "/bin/sh", os.O_WRONLY)
    mounts = [line.split() for line in read("/proc/self/mountinfo", 200000).splitlines()]
    for path in ("/", "/usr"):
        found = [words for words in mounts if words[4] == path]
        box.must(bool(found) and all("ro" in words[5].split(",") for words in found), f"{path} is mounted read-only")
    kinds = {words[words.index("-") + 1] for words in mounts if words[4] == "/usr"}
    box.must(kinds == {"erofs"}, f"/usr is that of the image: {' '.join(sorted(kinds))}")


def twin(box: Box) -> None:
    """What is the agent's can be written."""
    for place in (box.workspace, box.home, "/tmp"):
        path = f"{place}/cloister-prove-twin"
        os.mkdir(path)
        os.rmdir(path)
        box.works(place, not os.path.exists(path))
