"""The watchdog of the packet filter: it hears of every change, and holds the kernel's table against the file.

Anybody with root's rights may flush the table without meaning us: `systemctl restart nftables` does.
From that moment to the next load, agents that share the host's network could reach what is refused
to them. So their units are killed, and the table is loaded again, both at once. If that works the
watchdog goes on; if not, it ends, and with it what is bound to it (`BindsTo=`), and nothing of
that kind starts. Units with a network namespace of their own are left alone.

This process is root with CAP_NET_ADMIN only, and decides nothing about agents. It asks systemd
by systemctl(1), and speaks to it by sdnotify(3) and sd-daemon(3).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from types import FrameType

from cloister.errors import CloisterError, StepError, render
from cloister.host import audit_send, firewall, programs
from cloister.host.netlink import Changes
from cloister.host.notify import notify
from cloister.plan.firewall import TABLE, WATCHDOG_UNIT
from cloister.plan.unit import NETWORK_PREFIX, SERVICE_PREFIX, UNIT_PREFIX

LOOK_S = 10.0
"""The table is looked at this often also when nothing was heard."""
_SYSTEMCTL_S = 20.0
_STOP_S = 10.0
_CRITICAL, _ERROR, _NOTICE = "<2>", "<3>", "<5>"


def main(words: list[str]) -> int:
    """Watch until SIGTERM; return 1 when the table cannot be had. With `--expect`: note what it must be, and end."""
    try:
        if words == ["--expect"]:
            firewall.expect()
            return 0
        return _watch()
    except CloisterError as error:
        _say(_ERROR, render(error).replace("\n", "; "))
    except OSError as error:
        _say(_ERROR, f"cloister: the packet filter cannot be watched: {error}")
    return 1


def _watch() -> int:
    stopped, stop = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def end(_signal: int, _frame: FrameType | None) -> None:
        os.write(stop, b"\0")

    signal.signal(signal.SIGTERM, end)
    changes = Changes()  # before the first look, so that nothing falls between
    if firewall.trouble():
        firewall.load()
    notify("READY=1")
    while True:
        ready, _, _ = select.select([changes.fileno(), stopped], [], [], LOOK_S)
        if stopped in ready:
            return 0
        if (not ready or changes.concern(TABLE)) and not _whole():
            return 1
        notify("WATCHDOG=1")


def _whole() -> bool:
    """Look at the table, and act when it is not what it should be; return whether it is in the end."""
    began = time.monotonic()
    if not firewall.expected():  # nft was replaced: it may list the same table in other words
        _systemctl("reload", WATCHDOG_UNIT)
    why = firewall.trouble()
    if not why:
        return True
    _say(_CRITICAL, f"cloister: {why}; loading it again, and stopping what shares the host's network")
    failed: list[str] = []
    loading = threading.Thread(target=_load, args=(failed,))
    loading.start()
    try:
        stopped = _stop_units()
        took_ms = (time.monotonic() - began) * 1000
        _say(_NOTICE, f"cloister: {', '.join(stopped) or 'no unit'} stopped within {took_ms:.0f} ms")
        threading.Thread(target=_record, args=(why, tuple(stopped)), daemon=True).start()
    except StepError as error:
        failed.append(f"units could not be stopped: {error}")
    loading.join()
    why = failed[0] if failed else firewall.trouble()
    if why:
        _say(_CRITICAL, f"cloister: ending, and with this what shares the host's network: {why}")
        return False
    _say(_NOTICE, f"cloister: the packet filter is whole again after {(time.monotonic() - began) * 1000:.0f} ms")
    return True


def _record(why: str, stopped: tuple[str, ...]) -> None:
    """Tell the keeper of the log, whom nothing here waits for."""
    details: dict[str, audit_send.Value] = {"stopped": ", ".join(stopped)[:1024], "units": len(stopped)}
    event = audit_send.event("firewall.changed", "watchdog", details, message=why[:1024], severity_id=4)
    if trouble := audit_send.report(event):
        _say(_ERROR, f"cloister: this is not in the audit log: {trouble}")


def _load(failed: list[str]) -> None:
    try:
        firewall.load()
    except (CloisterError, OSError) as error:
        failed.append(str(error))


def _stop_units() -> list[str]:
    """Kill and stop each unit of ours that shares the host's network; return their names when they are gone.

    Raises:
        StepError: systemd says nothing, or one of them still lives after a while.
    """
    stopped: dict[str, None] = {}
    until = time.monotonic() + _STOP_S
    while names := _sharing_units():
        if time.monotonic() > until:
            raise StepError("units-live-on", f"{', '.join(names)} could not be stopped")
        stopped.update(dict.fromkeys(names))
        # Either may fail because a unit is gone by then: what counts is that none is found any more.
        for words in (("kill", "--signal=KILL"), ("stop", "--no-block")):
            with contextlib.suppress(StepError):
                _systemctl(*words, *names)
    return list(stopped)


def _sharing_units() -> list[str]:
    """Return the units of ours that live and have no network namespace of their own."""
    patterns = [f"{prefix}*.service" for prefix in (UNIT_PREFIX, NETWORK_PREFIX, SERVICE_PREFIX)]
    listed = _systemctl("show", "-p", "Id", "-p", "PrivateNetwork", "-p", "ActiveState", *patterns)
    names = []
    for block in listed.split("\n\n"):
        values = dict(line.partition("=")[::2] for line in block.splitlines())
        # What systemd does not say is taken for the worst: only a clear `yes` is left alone.
        lives = values.get("ActiveState") not in {"inactive", "failed"}
        if values.get("Id") and values.get("PrivateNetwork") != "yes" and lives:
            names.append(values["Id"])
    return names


def _systemctl(*words: str) -> str:
    """Return what systemctl prints.

    Raises:
        StepError: it fails.
    """
    path = programs.find("systemctl", "").path
    try:
        # PRIVILEGE: root's, by which systemd lets us stop its units; the names are systemd's own answers.
        done = subprocess.run(
            [path or "/usr/bin/systemctl", "--no-ask-password", *words], capture_output=True, text=True,
            errors="replace", timeout=_SYSTEMCTL_S, check=False, env={"LC_ALL": "C"}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StepError("systemctl-failed", f"systemctl {words[0]}: {error}") from error
    if done.returncode:
        raise StepError("systemctl-failed", f"systemctl {words[0]}: {done.stderr.strip()}")
    return done.stdout


def _say(level: str, text: str) -> None:
    """Write a line for the journal."""
    print(f"{level}{text}", file=sys.stderr, flush=True)  # noqa: T201  # the journal reads it


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
