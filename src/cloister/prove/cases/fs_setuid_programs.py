"""Become root through setuid programs."""

import os
import stat
import subprocess

from cloister.prove.inside.support import Box

ID = "fs-setuid-programs"
TITLE = "Become root through setuid programs"
PROMISE = "P-039"
CLASSES = (18,)
EXPECT = "no_new_privs: they run as the caller, and system mounts are nosuid"
SHAPE = "any"


PROBES = {
    "sudo": ["-n", "id", "-u"],
    "pkexec": ["id", "-u"],
    "mount": ["-t", "tmpfs", "none", "/tmp"],
    "newgrp": ["root"],
    "newuidmap": ["1", "0", "0", "1"],
    "fusermount3": ["-u", "/tmp"],
    "doas": ["-n", "id"],
}


def attack(box: Box) -> None:
    """Run every setuid program that is there; none may report or act as root."""
    found = 0
    for folder in ("/usr/bin", "/usr/sbin", "/usr/lib/dbus-1.0", "/usr/lib/openssh"):
        for name in os.listdir(folder) if os.path.isdir(folder) else []:
            path = f"{folder}/{name}"
            if os.path.islink(path) or not os.stat(path).st_mode & (stat.S_ISUID | stat.S_ISGID):
                continue
            found += 1
            if name in PROBES:
                done = subprocess.run(
                    [path, *PROBES[name]], stdin=subprocess.DEVNULL, capture_output=True, timeout=3, check=False
                )
                box.must(done.returncode != 0 and done.stdout.strip() != b"0", f"{name}: exit {done.returncode}")
    status = dict(line.split(":\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\t" in line)
    box.must(status["NoNewPrivs"] == "1", f"{found} setuid programs, NoNewPrivs {status['NoNewPrivs']}")
    flags = [line.split()[5] for line in open("/proc/self/mountinfo") if line.split()[4] == "/usr"]
    box.must(bool(flags) and "nosuid" in flags[-1], f"/usr is mounted {flags[-1:]}")
