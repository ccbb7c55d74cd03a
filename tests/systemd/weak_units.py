"""Units that lack a property on purpose, to see that the battery finds them out. Not for anything else.

`python weak_units.py ATTEMPTS` runs inside a test machine, as root. Both are JSON: in, pairs of property names to leave
out and ids of cases; out, for each pair the outcomes by case. Nothing but systemd makes these units: no daemon of
ours, no shim, no filter of ours, so the properties stand alone.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile

from cloister.host.systemd_version import systemd_version
from cloister.isolation import unit
from cloister.policy.protected import effective_names
from cloister.prove.canaries import Canaries
from cloister.prove.case import load
from cloister.prove.runner import Battery

ACCOUNT, UID = "cl-weak-alice", 1900000778
TREE = "/run/weak-root"
ETC = "/run/weak-etc"
BASES = "/srv/weak"
"""Without set-uid programs and devices, as hostd mounts workspaces."""
_SETUP = f"""
    set -e
    getent group {ACCOUNT} >/dev/null || groupadd --gid {UID} {ACCOUNT}
    id {ACCOUNT} >/dev/null 2>&1 || useradd --uid {UID} --gid {UID} -M -s /usr/sbin/nologin {ACCOUNT} 2>/dev/null
    mkdir -p {BASES}; mountpoint -q {BASES} || mount -t tmpfs -o nosuid,nodev,mode=755 tmpfs {BASES}
    for name in usr etc proc sys dev run tmp home root var/tmp .cloister; do mkdir -p {TREE}/$name; done
    for name in bin sbin lib lib64; do [ -L {TREE}/$name ] || ln -s usr/$name {TREE}/$name; done
    mkdir -p {ETC} && cp -r /etc/passwd /etc/group /etc/ld.so.cache /etc/ssl /etc/alternatives {ETC}
"""


class WeakUnit:
    """A unit with a run's properties but for some; the workspace is bound by systemd."""

    def __init__(self, base: str, without: list[str]) -> None:
        """Take a directory of the test's own."""
        self.base, self.home, self.runtime = base, f"{base}/home", f"{base}/run"
        box = unit.UnitBox(
            systemd=systemd_version(), account=ACCOUNT, shim="/usr/bin/true", etc_directory=ETC, merged_usr=True
        )
        properties = [(name, value) for name, value in unit.properties(box) if name not in without]
        if "RootDirectory" in without:  # what is mounted onto it goes with it
            properties = [one for one in properties if one[0] != "BindReadOnlyPaths"]
        self._flags = [f"--property={name}={value.replace(unit.SKELETON, TREE)}" for name, value in properties]

    @property
    def environment(self) -> dict[str, str]:
        """Of systemd-run, whose unit gets none of it."""
        return {"PATH": os.defpath, "LANG": "C.UTF-8"}

    def command(self, directory: str, words: tuple[str, ...], *, pty: bool = False) -> list[str]:
        """Return systemd-run's argv."""
        del pty
        bound = [f"--property=BindPaths={directory}", f"--setenv=HOME={directory}"]
        return ["/usr/bin/systemd-run", "--quiet", "--wait", "--pipe", "--collect", *self._flags, *bound, "--", *words]

    def stop_broker(self, number: int = 0) -> None:
        """There is none."""
        del number


class Weak(Battery):
    """A battery whose workspaces and canaries are the account's, so that ownership stops nothing."""

    def workspace(self, shape: str) -> str:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        """Make one."""
        path = super().workspace(shape)
        subprocess.run(["chown", "-R", f"{UID}:{UID}", self.ground.base], check=True)
        self.canaries.disturbed()  # that was us
        return path


def attack(without: list[str], names: list[str]) -> dict[str, str]:
    """Try cases; return outcomes by id."""
    base = tempfile.mkdtemp(prefix="weak-", dir=BASES)
    protected = effective_names((), ())
    facts = {
        "protected": [[entry.name, entry.kind] for entry in protected if entry.when == "always"],
        "protected_present": [[entry.name, entry.kind] for entry in protected], "host_addresses": [],
        "host_homes": ["/home/alice", "/home/bob"], "host_name": os.uname().nodename, "host_machine_id": "",
        "pass_environment": [], "given_variables": [], "overlay": False, "policy": "/etc/cloister/cloister.toml",
        "cloister_paths": [], "unit": True, "caller_uid": pwd.getpwnam("alice").pw_uid,
        "accounts": [["cl-sh-bob", UID + 1]], "unit_directories": ["/var/lib/cloister", "/etc/cloister"],
        "unit_sockets": ["/run/dbus/system_bus_socket"],
    }  # fmt: skip
    cases = load()
    try:
        for name in ("home", "run"):
            os.mkdir(f"{base}/{name}")
        with Canaries(base, f"{base}/home") as canaries:
            for path in (*canaries.facts["shared_canaries"], canaries.facts["home_canary"]):
                os.chown(path, UID, UID)
            battery = Weak(WeakUnit(base, without), canaries, frozenset(), facts)
            results = battery.run([cases[name] for name in names])
        return {result.case.id: f"{result.outcome}: {result.detail[:300]}" for result in results}
    finally:
        shutil.rmtree(base)


def main() -> None:
    """Make all attempts."""
    subprocess.run(["sh", "-c", _SETUP], check=True)
    json.dump([attack(without, names) for without, names in json.loads(sys.argv[1])], sys.stdout)


if __name__ == "__main__":
    main()
