"""Schedule something for later: cron, at, systemd timers."""

import os
import subprocess

from cloister.prove.inside.support import Box, write

ID = "persist-scheduled"
TITLE = "Schedule something for later: cron, at, systemd timers"
PROMISE = "P-041"
CLASSES = (19, 43)
EXPECT = "no spool directory, no socket of a service manager"
SHAPE = "any"


COMMANDS = (
    ["crontab", "-"],
    ["at", "now + 1 minute"],
    ["batch"],
    ["systemd-run", "--user", "--on-active=60", "true"],
    ["systemd-run", "--user", "--scope", "true"],
    ["systemctl", "--user", "daemon-reload"],
    ["systemctl", "--user", "link", "/tmp/x.service"],
    ["run0", "id"],
    ["loginctl", "enable-linger"],
    ["busctl", "--user", "list"],
    ["busctl", "--system", "list"],
    ["dbus-send", "--system", "--print-reply", "--dest=org.freedesktop.DBus", "/", "org.freedesktop.DBus.ListNames"],
    [
        "gdbus",
        "call",
        "--session",
        "--dest",
        "org.freedesktop.DBus",
        "--object-path",
        "/",
        "--method",
        "org.freedesktop.DBus.ListNames",
    ],
    ["machinectl", "shell"],
    ["pkexec", "id"],
    ["loginctl", "list-sessions"],
)


def attack(box: Box) -> None:
    """With the tools where they are, and without them."""
    for words in COMMANDS:
        path = next(
            (
                f"{folder}/{words[0]}"
                for folder in ("/usr/bin", "/usr/sbin", "/bin")
                if os.access(f"{folder}/{words[0]}", os.X_OK)
            ),
            "",
        )
        if path:
            done = subprocess.run(
                [path, *words[1:]], input=b"* * * * * touch /tmp/evil\n", capture_output=True, timeout=5, check=False
            )
            box.must(done.returncode != 0, f"{' '.join(words)}: exit {done.returncode}")
    for folder in ("/var/spool/cron/crontabs", "/var/spool/cron", "/var/spool/at", "/etc/cron.d", "/etc/cron.hourly"):
        box.refused(folder, "ENOENT EACCES EROFS", write, f"{folder}/evil")
