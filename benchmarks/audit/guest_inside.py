"""In the guest of `benchmarks.audit.guest`: the loop of openat and close under each observer; prints JSON lines."""

from __future__ import annotations

import json
import os
import platform
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cloister.audit import calls
from cloister.host import kernel_events, kernel_programs

CGROUP = "/sys/fs/cgroup/agent"
MANY = "20000"
ROUNDS = 3
RULE = "-a always,exit -F arch=b64 -S openat,execve,connect"


def cost() -> float:
    """Return nanoseconds of CPU time of one round of the loop, in the watched cgroup."""
    inside = ["/bin/sh", "-c", 'echo $$ >"$0" && exec "$@"', f"{CGROUP}/cgroup.procs", "/load", "openat", MANY]
    done = subprocess.run(inside, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[0])


@contextmanager
def watched(files: str) -> Iterator[None]:
    """Watch the cgroup: files by `lsm`, `fentry`, or by the tracepoints of system calls."""
    settings = kernel_programs.Settings(rates=(0, 0))
    with kernel_programs.Programs(settings) as programs:
        elsewhere = files in {"lsm", "fentry"}
        if elsewhere:
            programs.load(files)
        programs.load("calls", shapes=calls.shapes(platform.machine(), "security", files_elsewhere=elsewhere))
        programs.load("process")
        programs.configure([1], 0)
        programs.watch(os.stat(CGROUP).st_ino, 1, 0)
        sizes = (settings.critical_bytes, settings.bulk_bytes)
        reader = kernel_events.Reader(programs.maps["critical"], programs.maps["bulk"], sizes, kernel_events.boot_id())
        reader.name(1, {"run": "r", "agent": "a"})
        reader.describe([kernel_events.Call(*row) for row in calls.described(platform.machine())])
        over = threading.Event()
        thread = threading.Thread(target=follow, args=(reader, over.is_set))
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            reader.close()


def follow(reader: kernel_events.Reader, over: Callable[[], bool]) -> None:
    """Write what comes to a file in memory, as a keeper would."""
    with open("/tmp/lines", "wb", buffering=0) as file:  # the guest's own
        while True:
            ended, batch = over(), reader.take(0, bytes(32))
            file.write(batch.lines)
            reader.commit()
            if not batch.lines:
                if ended:
                    return
                time.sleep(0.005)


@contextmanager
def audited() -> Iterator[None]:
    """Have auditd write the same calls. Its kernel part slows each call until the next boot: it comes last."""
    os.makedirs("/var/log/audit", mode=0o700)
    daemon = subprocess.Popen(["/sbin/auditd", "-f"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    time.sleep(2)
    if daemon.poll() is not None:
        sys.exit(str(daemon.stdout and daemon.stdout.read()))
    subprocess.run(["/sbin/auditctl", *RULE.split()], check=True, stdout=subprocess.DEVNULL)
    yield


def main() -> None:
    """Measure each in turn, round by round; what cannot be taken back comes at the end."""
    for name, minor in (("null", 3), ("zero", 5), ("urandom", 9)):
        if not os.path.exists(f"/dev/{name}"):
            os.mknod(f"/dev/{name}", 0o666 | stat.S_IFCHR, os.makedev(1, minor))
    for folder in ("/var/run", "/run"):
        os.makedirs(folder, exist_ok=True)
    os.mkdir(CGROUP)
    cost()
    for _ in range(ROUNDS):
        tell("nothing", cost())
        for files in ("lsm", "fentry", "tracepoint"):
            with watched(files):
                tell(files, cost())
    with audited():
        for _ in range(ROUNDS):
            tell("auditd", cost())


def tell(name: str, nanoseconds: float) -> None:
    """Print one measurement."""
    sys.stdout.write(json.dumps({"name": name, "ns": nanoseconds}) + "\n")
    sys.stdout.flush()


main()
