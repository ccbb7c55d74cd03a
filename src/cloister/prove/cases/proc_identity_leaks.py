"""Learn about the host: its name, its machine id, its command line, its mounts."""

import os

from cloister.prove.inside.support import Box, read

ID = "proc-identity-leaks"
TITLE = "Learn about the host: its name, its machine id, its command line, its mounts"
PROMISE = "P-032"
CLASSES = (34,)
EXPECT = "own names; mounts and ids of the host do not show"
SHAPE = "any"


def attack(box: Box) -> None:
    """What the host says of itself must not be what the sandbox says."""
    facts = {
        "host name": (os.uname().nodename, "host_name"),
        "machine id": (
            read("/etc/machine-id").strip() if os.path.exists("/etc/machine-id") else "none",
            "host_machine_id",
        ),
    }
    for name, (value, fact) in facts.items():
        box.must(value != box.fact(fact) or not value, f"{name}: another")
    mounts = read("/proc/self/mountinfo", 200000)
    secret_folder = os.path.dirname(str(box.fact("secret")))
    box.must(secret_folder not in mounts, "mountinfo: nothing beside the workspace")
    if box.facts.get("guest"):
        box.stopped("uid map: of the guest's own kernel")
        return
    for line in read("/proc/self/uid_map").splitlines():
        box.must(line.split()[2] == "1", f"uid map of {line.split()[2]} id")
