"""What being watched costs by LSM and fentry, and what auditd costs: `python -m benchmarks.audit.guest`.

The machine of the other tables may refuse BPF in LSM hooks, and auditd would slow each system call of it until its next
boot. So these run in a guest with Debian's kernel, emulated, whose clock counts instructions: rows compare how many of
them each needs, which no load of this machine changes, and say nothing of caches and page tables. auditd is fetched
from Debian's mirror and installed nowhere.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import world
from benchmarks.__main__ import keep
from benchmarks.report import Grid, Line, Part, Target, markdown
from tests.vm import small

HERE = Path(__file__).parent
TIMEOUT_S = 900
ROWS = {
    "nothing": "nothing attached", "lsm": "files by LSM", "fentry": "files by fentry",
    "tracepoint": "files by tracepoints", "auditd": "auditd: openat, execve, connect",
}  # fmt: skip
COLUMNS = ["instructions per openat + close", "x nothing"]
MACHINE = ("-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-smp", "1")
"""A nanosecond of the guest is one instruction."""
CONFIGURATION = """\
log_file = /var/log/audit/audit.log
log_format = RAW
flush = NONE
num_logs = 0
max_log_file_action = IGNORE
space_left = 2
admin_space_left = 1
space_left_action = IGNORE
admin_space_left_action = IGNORE
disk_full_action = IGNORE
disk_error_action = IGNORE
"""
WANTED = 1.3


def main() -> None:
    """Measure, and print or keep the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.audit.guest", description=__doc__)
    parser.add_argument("kernel", type=Path, help="Debian's kernel: vmlinuz of what tools/vm-image prints")
    parser.add_argument(
        "--output", type=Path, default=None, help="folder of results.md and .json to put the table into"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cloister-guest-") as name:
        part = measure(options.kernel, Path(name))
    host = world.host({})
    if options.output:
        keep(options.output, host, part)
    print(markdown(host, [part]))


def measure(kernel: Path, scratch: Path) -> Part:
    """Return the table."""
    load = scratch / "load"
    subprocess.run(["cc", "-O2", "-static", "-o", load, HERE / "load.c"], check=True)
    hostname = scratch / "hostname"
    hostname.write_text("guest\n")
    files = {"/load": load, "/etc/hostname": hostname, **auditd(scratch)}
    status, said = small.run(kernel, HERE / "guest_inside.py", files, scratch, TIMEOUT_S, MACHINE)
    if status:
        sys.exit(said[-4000:])
    found: dict[str, list[float]] = {}
    for line in said.splitlines():
        if line.startswith("{"):
            one = json.loads(line)
            found.setdefault(one["name"], []).append(one["ns"])
    medians = {name: statistics.median(values) for name, values in found.items()}
    lines = [
        Line(shown, dict(zip(COLUMNS, (medians[name], medians[name] / medians["nothing"]), strict=True)))
        for name, shown in ROWS.items()
    ]
    best = min(medians["lsm"], medians["fentry"]) / medians["nothing"]
    outcome = f"{'Met' if best <= WANTED else 'Missed'}: {best:.2f}."
    release = re.findall(rb"\d+\.\d+\.\d+-\d+[a-z0-9-]*", kernel.read_bytes()[: 1 << 20])
    return Part("guest", datetime.now(UTC).strftime("%Y-%m-%d"), [Grid(
        "Audit: by LSM and fentry, and auditd, in an emulated guest", COLUMNS, lines,
        f"Debian's kernel {release[0].decode() if release else ''} under QEMU, which counts instructions instead of "
        "time; the reader writes to memory. Medians of rounds in turn; auditd last, since what it switches on stays.",
        [Target(f"at most {WANTED} x", outcome)],
    )])  # fmt: skip


def auditd(scratch: Path) -> dict[str, Path]:
    """Return auditd's files for the guest, from Debian's packages, unpacked and not installed."""
    subprocess.run(["apt-get", "download", "-q", "auditd", "libauparse0"], cwd=scratch, check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    tree = scratch / "auditd"
    for package in scratch.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, tree], check=True)
    configuration = scratch / "auditd.conf"
    configuration.write_text(CONFIGURATION)
    libraries = {f"/{path.relative_to(tree)}": path for path in tree.rglob("*.so*") if path.is_file()}
    for path in tree.rglob("*.so.0"):
        libraries[f"/{path.relative_to(tree)}"] = Path(os.path.realpath(path))
    programs = {f"/sbin/{name}": tree / "sbin" / name for name in ("auditd", "auditctl")}
    return {**programs, **libraries, "/etc/audit/auditd.conf": configuration}


if __name__ == "__main__":
    main()
