"""Have systemd, sudo, su, cron or at run something with other rights."""

import os
import subprocess

from cloister.prove.inside.support import Box, write

ID = "unit-escalation"
TITLE = "Have systemd, sudo, su, cron or at run something with other rights"
PROMISE = "P-291"
CLASSES = (18, 19, 73, 74, 75, 76)
EXPECT = "there is nobody to ask: no bus, no spool, and set-uid programs gain nothing"
SHAPE = "any"
IF_POLICY = ("unit",)
LIMIT_S = 40.0

TRACE = "/tmp/cloister-prove-escalated"  # the unit's own, looked at right here
COMMANDS = (
    ["systemd-run", "--wait", "touch", TRACE],
    ["systemd-run", "--uid=0", "--scope", "touch", TRACE],
    ["systemctl", "start", "cloister-hostd.service"],
    ["systemctl", "stop", "cloister-proxyd.service", "cloister-firewall.service"],
    ["systemctl", "set-property", "cloister.slice", "MemoryMax=infinity"],
    ["systemctl", "--root=/", "enable", "/tmp/evil.service"],
    ["systemctl", "link", "/tmp/evil.service"],
    ["systemctl", "edit", "--full", "--force", "cloister-run-evil.service"],
    ["busctl", "call", "org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager",
     "StopUnit", "ss", "cloister-proxyd.service", "replace"],
    ["run0", "--background=", "touch", TRACE],
    ["su", "-c", f"touch {TRACE}"],
    ["su", "root", "-c", "true"],
    ["runuser", "-u", "root", "--", "touch", TRACE],
    ["sudo", "-n", "touch", TRACE],
    ["pkexec", "touch", TRACE],
    ["newgrp", "root"],
    ["chsh", "-s", "/bin/sh"],
    ["newuidmap", str(os.getpid()), "0", "0", "1"],
    ["setpriv", "--reuid=0", "--regid=0", "--clear-groups", "true"],
    ["loginctl", "enable-linger"],
    ["loginctl", "terminate-user", "root"],
    ["machinectl", "list"],
    ["at", "-f", "/dev/null", "now"],
    ["crontab", "-l"],
    ["nft", "flush", "ruleset"],
    ["nft", "list", "ruleset"],
    ["ip", "link", "set", "lo", "down"],
    ["cloister", "setup", "--yes"],
    ["cloister", "uninstall", "--yes"],
    ["cloister", "run", "sh", "--", "true"],
)  # fmt: skip
FOLDERS = ("/usr/local/bin", "/usr/bin", "/usr/sbin", "/usr/local/sbin", "/opt/cloister/bin")


def attack(box: Box) -> None:
    """With every tool that is there, and with files where others look for orders."""
    write("/tmp/evil.service", f"[Service]\nExecStart=/usr/bin/touch {TRACE}\n")
    absent = []
    for words in COMMANDS:
        path = next((f"{folder}/{words[0]}" for folder in FOLDERS if os.access(f"{folder}/{words[0]}", os.X_OK)), "")
        if not path:
            absent.append(words[0])
            continue
        try:
            done = subprocess.run(
                [path, *words[1:]], stdin=subprocess.DEVNULL, capture_output=True, timeout=4, check=False
            )
        except (subprocess.TimeoutExpired, PermissionError) as error:
            box.stopped(f"{' '.join(words)[:60]}: {type(error).__name__}")
            continue
        nothing_done = words[:2] == ["newgrp", "root"] and done.stdout == b""
        box.must(done.returncode != 0 or nothing_done, f"{' '.join(words)[:60]}: exit {done.returncode}")
    box.must(not os.path.exists(TRACE), f"nothing ran for us; not there: {', '.join(dict.fromkeys(absent))}")
    for folder in ("/etc/systemd/system", "/run/systemd/system", "/etc/systemd/system/cloister-hostd.service.d",
                   "/run/systemd/transient", "/etc/sudoers.d", "/etc/cron.d", "/var/spool/cron/crontabs",
                   "/etc/tmpfiles.d", "/etc/polkit-1/rules.d", "/var/lib/systemd/linger"):  # fmt: skip
        box.refused(folder, "ENOENT EACCES EROFS", write, f"{folder}/evil")


def twin(box: Box) -> None:
    """Ordinary programs run."""
    done = subprocess.run(["/usr/bin/env", "true"], capture_output=True, timeout=5, check=False)
    box.works("env true", done.returncode == 0)
