"""What the tests of hostd need in a machine: accounts, grants, trees of /run and /var, sockets, a broker's stand-in.

Not an installation: `cloister setup` makes all of this, and more, on a real host.
"""

from __future__ import annotations

import json
import subprocess
import time
from typing import Any

from cloister.isolation import unit
from support.machines import PYTHON, TESTS, Machine

ACCOUNT, UID = "cl-pi-alice", 1900000001
BOB_ACCOUNT, BOB_UID = "cl-pi-bob", 1900000002
SHIM = "/opt/cloister/bin/cloister"
SOCKET_UNIT = """[Socket]
ListenStream=/run/cloister/hostd.sock
SocketMode=0666
"""
SERVICE_UNIT = f"""[Unit]
Requires=cloister-hostd.socket
After=cloister-hostd.socket
[Service]
ExecStart={PYTHON} -I -m cloister.services.hostd
UMask=0077
KillMode=mixed
"""
_PREPARE = r"""
set -e
for one in cl-pi-alice:1900000001 cl-pi-bob:1900000002 cloister-proxy:1899999999; do
  name=${one%:*} uid=${one#*:}
  getent group "$name" >/dev/null || groupadd --gid "$uid" "$name"
  getent passwd "$name" >/dev/null || useradd --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin \
    --uid "$uid" --gid "$uid" "$name" 2>/dev/null
done
cd /run; mkdir -p cloister/proxy/runs cloister/etc cloister/units; chmod 755 cloister cloister/etc cloister/units
chown -R cloister-proxy: cloister/proxy; chmod 700 cloister/proxy
mkdir -p cloister/root; cd cloister/root
mkdir -p .cloister dev etc home proc root run/cloister/box run/cloister/bin sys tmp usr var/tmp
for name in bin sbin lib lib64; do [ -h "$name" ] || ln -s "usr/$name" "$name"; done
touch .cloister/cloister-shim
mkdir -p /var/lib/cloister/agents /var/lib/cloister/hostd; chmod 700 /var/lib/cloister/hostd
systemctl daemon-reload
systemctl start cloister-hostd.socket
"""


class Rig:
    """A machine with hostd, and a stand-in for the broker."""

    def __init__(self, machine: Machine) -> None:
        """Install."""
        self.machine = machine
        machine.write("/etc/systemd/system/cloister-hostd.socket", SOCKET_UNIT)
        machine.write("/etc/systemd/system/cloister-hostd.service", SERVICE_UNIT)
        machine.run(["sh", "-c", _PREPARE])
        self.grant({"alice": ["~/p", "work", "/srv/shared"], "bob": ["~/p"]})
        self._number = 0
        self._broker: subprocess.Popen[bytes] | None = None
        self._folder = "/run/cloister-test"
        machine.run(["install", "-d", "-o", "cloister-proxy", "-m", "0755", self._folder])
        self.answer(self.plan(["true"]))

    def grant(self, roots: dict[str, list[str]], *, nested: bool = False) -> None:
        """Write down who may start pi below which roots."""
        accounts = [
            {"name": name, "uid": uid, "agent": "pi", "user": user}
            for user, name, uid in (("alice", ACCOUNT, UID), ("bob", BOB_ACCOUNT, BOB_UID))
        ]
        grants = [
            {"user": user, "agent": "pi", "account": f"cl-pi-{user}", "roots": places, "nested": nested}
            for user, places in roots.items()
        ]
        system = {"version": 1, "policy_digest": "", "accounts": accounts, "grants": grants}
        self.machine.write("/var/lib/cloister/system.json", json.dumps(system))

    def plan(
        self,
        command: list[str],
        mounts: list[dict[str, Any]] | None = None,
        properties: list[tuple[str, str]] | None = None,
        user: str = "alice",
        **launch: Any,
    ) -> dict[str, Any]:
        """Return a plan as the system's broker makes it; @RUN@ and @ROOT@ are filled in by the stand-in."""
        account, uid = f"cl-pi-{user}", {"alice": UID, "bob": BOB_UID}[user]
        box = unit.UnitBox(
            systemd=self.machine.version, account=account, shim=SHIM, etc_directory="/etc",
            merged_usr=True,
        )  # fmt: skip
        own = [
            {"kind": "tmpfs", "target": "/home"},
            {"kind": "tmpfs", "target": "/srv"},
            {"kind": "tmpfs", "target": "/tmp", "private": True},
            {"kind": "tmpfs", "target": f"/home/{account}", "private": True},
            {"kind": "ro", "target": "/run/cloister/box", "base": "box"},
            {"kind": "rw", "target": "@ROOT@", "base": "workspace"},
        ]
        step = {
            "step": "launch",
            "argv": [unit.SHIM, "inner", "--unit", "--ctl", "0", "--egress", "/run/cloister/box/egress.sock",
                     "--landlock", "off", "--probe-write", "/usr"],
            "command": command,
            "directory": "@DIRECTORY@",
            "environment": {},
            "unit": {
                "unit": "cloister-run-@RUN@.service",
                "account": account,
                "uid": uid,
                "properties": properties if properties is not None else [list(one) for one in unit.properties(box)],
                "mounts": [*own, *(mounts or [])],
                "project": "0123456789abcdef",
                "workspace": "@ROOT@",
                **launch,
            },
        }  # fmt: skip
        return {
            "run": "@RUN@", "agent": "pi", "preset": "pi", "isolation": "unit", "workspace": "@ROOT@",
            "policy_digest": "", "steps": [step],
        }  # fmt: skip

    def answer(self, plan: dict[str, Any], refuse: list[Any] | None = None) -> None:
        """Say what the broker answers from now on."""
        text = json.dumps({"plan": plan, **({"refuse": refuse} if refuse else {})})
        self.machine.write(f"{self._folder}/answers.json", text)

    def start_broker(self) -> None:
        """Start the stand-in."""
        log = f"{self._folder}/log"
        self.machine.run(["rm", "-f", log, "/run/cloister/proxyd.sock"])
        words = [PYTHON, "-m", "support.fake_proxyd", f"{self._folder}/answers.json", log]
        self._broker = self.machine.popen(words, env={"PYTHONPATH": TESTS, "PYTHONDONTWRITEBYTECODE": "1"}, cwd="/")
        until = time.monotonic() + 10
        while not self.events("listening"):
            assert time.monotonic() < until, "the stand-in does not listen"
            time.sleep(0.02)

    def close(self) -> None:
        """End the stand-in and hostd."""
        if self._broker:
            self._broker.kill()
            self._broker.wait()
        self.machine.run(["systemctl", "stop", "cloister-hostd.socket", "cloister-hostd.service"], check=False)

    def events(self, name: str) -> list[Any]:
        """Return what the stand-in wrote down under this name."""
        try:
            lines = self.machine.read(f"{self._folder}/log").splitlines()
        except FileNotFoundError:
            return []
        return [event[name] for event in map(json.loads, lines) if name in event]

    def ask(
        self,
        workspace: str,
        *options: str,
        user: str = "alice",
        agent: str = "pi",
        run: str = "",
        input: str = "",  # noqa: A002
    ) -> tuple[list[Any], str, str]:
        """Ask as a user; return what hostd answered, what the agent printed, and the run's id."""
        self._number += 1
        run = run or f"t{self._number}-{time.monotonic_ns() % 10**9}"
        done = self.machine.run(
            [PYTHON, "-m", "support.hostd_client", agent, run, workspace, *options],
            user=user, cwd="/", env={"PYTHONPATH": TESTS, "PYTHONDONTWRITEBYTECODE": "1"}, input=input, check=False,
        )  # fmt: skip
        assert "[" in done.stderr, done.stderr
        return json.loads(done.stderr.strip().splitlines()[-1]), done.stdout, run

    def refusal(self, workspace: str, *options: str, **how: Any) -> str:
        """Ask for a run that must be refused; return the words."""
        answer, printed, run = self.ask(workspace, *options, **how)
        assert [kind for kind, _ in answer] == ["F"], (answer, printed)
        assert printed == ""
        self.nothing_left(run)
        return str(answer[0][1][1])

    def begin(self, workspace: str, run: str, user: str = "alice") -> subprocess.Popen[Any]:
        """Begin a run that goes on until its standard input is closed; return when its command runs."""
        before = len(self.events("shim"))
        asking = self.machine.popen(
            [PYTHON, "-m", "support.hostd_client", "pi", run, workspace],
            user=user, cwd="/", env={"PYTHONPATH": TESTS, "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        until = time.monotonic() + 20
        while not any(event.startswith("R") for event in self.events("shim")[before:]):
            assert time.monotonic() < until, self.told()
            time.sleep(0.02)
        return asking

    def nothing_left(self, run: str) -> None:
        """Look that neither unit, record nor directory of a run is there: who ends it may be answered before."""
        until = time.monotonic() + 5
        while (left := self._left(run)) and time.monotonic() < until:
            time.sleep(0.05)
        assert not left

    def _left(self, run: str) -> list[str]:
        units = self.machine.run(["systemctl", "list-units", "--all", "--plain", "cloister-run-*"]).stdout
        records = self.machine.run(["ls", "/var/lib/cloister/hostd/runs"], check=False).stdout
        there = {
            "unit": f"cloister-run-{run}.service" in units,
            "directory": self.machine.path(f"/run/cloister/units/{run}").exists(),
            "record": run in records,
        }
        return [what for what, is_there in there.items() if is_there]

    def told(self) -> str:
        """Return what there is to know after a failure."""
        events = {name: self.events(name) for name in ("shim", "refused", "broken", "stood", "ended")}
        return f"{events}\n{self.machine.journal('cloister-hostd')}"
