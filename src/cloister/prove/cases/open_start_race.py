"""Get control before the rules hold."""

import os

from cloister.prove.inside.support import Box

ID = "open-start-race"
TITLE = "Get control before the rules hold"
PROMISE = "P-046"
CLASSES = (88,)
EXPECT = "the first instruction of the agent already runs confined, and no earlier process is in reach"
FRESH = True


def attack(box: Box) -> None:
    """The first process and this one carry the filter; there is no third that does not."""
    for name in sorted((name for name in os.listdir("/proc") if name.isdigit()), key=int):
        with open(f"/proc/{name}/status") as file:
            fields = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
        box.must(
            fields["Seccomp"] == "2" and fields["NoNewPrivs"] == "1",
            f"pid {name}: Seccomp {fields['Seccomp']}, NoNewPrivs {fields['NoNewPrivs']}",
        )
