"""In the guest: load one group of hooks, do things in a watched cgroup, and print the events as JSON lines."""

import contextlib
import json
import os
import platform
import subprocess
import sys

from cloister.audit import calls
from cloister.host import kernel_events, kernel_programs
from cloister.runs import kernel_tiers

CGROUP = "/sys/fs/cgroup/agent"


def act() -> None:
    """Be the agent."""
    with open(f"{CGROUP}/cgroup.procs", "w", encoding="ascii") as file:
        file.write("0")
    os.chdir("/tmp")
    os.mkdir("made")
    with open("made/one", "w", encoding="ascii"):
        pass
    os.rename("made/one", "/tmp/two")
    os.link("two", "three")
    os.symlink("elsewhere", "four")
    os.chmod("two", 0o600)
    os.truncate("two", 5)
    os.chown("two", 1, 1)
    for name in ("two", "three", "four"):
        os.unlink(name)
    os.rmdir("made")
    with contextlib.suppress(OSError):
        os.open("nowhere", os.O_RDONLY)
    subprocess.run(["/evade", "unmapped", "ring", "relative"], check=False)


def trial(group: str) -> None:
    """Watch with one group, and tell."""
    with kernel_programs.Programs() as programs:
        outcomes = programs.load(group)
        shapes = calls.shapes(platform.machine(), "security", files_elsewhere=True)
        outcomes += programs.load("process") + programs.load("calls", shapes=shapes) + programs.load("rings")
        root = os.open("/sys/fs/cgroup", os.O_RDONLY)
        outcomes += programs.load("network", cgroup=root)
        refused = {one.program: one.why_not for one in outcomes if one.why_not}
        loaded = {"group": group, "refused": refused, "tiers": kernel_tiers.tiers(programs.attached)}
        sys.stdout.write(f"{json.dumps(loaded)}\n")
        programs.configure([1], 0)
        programs.watch(os.stat(CGROUP).st_ino, 1, 0)
        reader = kernel_events.Reader(
            programs.maps["critical"], programs.maps["bulk"],
            (kernel_programs.CRITICAL_BYTES, kernel_programs.BULK_BYTES), kernel_events.boot_id(),
        )  # fmt: skip
        reader.name(1, {"run": group})
        reader.describe([kernel_events.Call(*row) for row in calls.described(platform.machine())])
        child = os.fork()
        if not child:
            act()
            os._exit(0)
        os.waitpid(child, 0)
        while (batch := reader.take(0, bytes(32))).lines:
            sys.stdout.write(bytes(batch.lines).decode())
            reader.commit()
        sys.stdout.flush()


os.makedirs("/etc", exist_ok=True)
for path in ("/etc/shells", "/etc/group", "/etc/services"):
    with open(path, "w", encoding="ascii"):
        pass
os.mkdir(CGROUP)
for one in ("lsm", "fentry"):
    trial(one)
