"""Machines with a real systemd: `Machine` boots one in half a second, runs commands in it as its users, ends it.

The file systems come from `tools/systemd-image`: Debian 12 (systemd 252) and 13 (257), and two more for slow tests.
What boots and cleans up is `support.machine_boot`, in a process of its own, so that nothing is left when the tests are
killed. Cloister is at /opt/cloister, from the built wheel; `tests` are at /srv/tests, the real agents, where
installed, at /opt/agents.

Needs root. What is really enforced differs by host: see `Machine.controllers`, and test denials, not settings.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from support.machine_boot import WITHHELD

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SUITES = ("bookworm", "trixie")
FURTHER = ("bookworm-backports", "forky")
"""Versions between those and after them, for `make test-all`: systemd 254, and 262 of a Debian still in the making."""
PYTHON = "/opt/cloister/bin/python"
AGENTS = "/opt/agents"
TESTS = "/srv/tests"
HERE_IT_IS = os.environ.get("CLOISTER_TEST_MACHINE") == "host"
"""The tests run in such a machine already (tests/vm): its PID 1 is a systemd, and Cloister is installed in it."""
BOOT_S = 30.0
"""How long a boot may take on a loaded machine; usually half a second."""

_ENTER = 'for file in $1; do echo 0 >"$file" || exit 125; done; shift; exec "$@"'
_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"


class MachineError(Exception):
    """The machine did not come up, or did not do what was asked of it; holds its last words."""


def image(suite: str) -> Path:
    """Return the folder that `tools/systemd-image` made for a suite; makes it where `tools/test` has not."""
    for folder in map(Path, filter(None, os.environ.get("CLOISTER_TEST_SYSTEMD", "").split(":"))):
        if (folder / "suite").read_text(encoding="utf-8").strip() == suite:
            return folder
    done = subprocess.run([ROOT / "tools/systemd-image", suite], stdout=subprocess.PIPE, text=True, check=True)
    return Path(done.stdout.strip())


def wheel(scratch: Path) -> Path:
    """Return the wheel that is tested; builds one from the sources where `tools/test` has not."""
    folder = Path(os.environ.get("CLOISTER_TEST_WHEEL") or scratch / "wheel")
    if not folder.exists():
        command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise MachineError(done.stdout + done.stderr)
    return next(folder.glob("*.whl"))


def install(base: Path, what: Path, layer: Path) -> Path:
    """Install a wheel as pip does, in a file system of its own that lies over the image; return it."""
    for name in ("root", "work", "merged"):
        (layer / name).mkdir(parents=True, mode=0o755)
    shutil.copy(what, layer / "root")
    script = """
        set -e
        mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/root,workdir=$2/work" "$2/merged"
        chroot "$2/merged" /opt/cloister/bin/pip install --quiet --no-index --no-deps "/$3"
        rm "$2/merged/$3"
    """
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "_", base, layer, what.name]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PATH": _PATH, "LC_ALL": "C.UTF-8"}
    )
    if done.returncode:
        raise MachineError(done.stdout + done.stderr)
    return layer / "root"


class Machine:
    """A machine that runs.

    Attributes:
        suite: Debian's name of it.
        pid: of its PID 1, as seen from here; another one after a reboot.
        hybrid: whether systemd sees cgroups v1 beside v2: on hosts whose controllers are bound to v1, so that limits
            are real on one of the machines at least. systemd 257 refuses such a host, and gets v2 alone.
    """

    def __init__(
        self, suite: str, lower: Sequence[Path], scratch: Path, binds: Mapping[str, Path] | None = None, name: str = ""
    ) -> None:
        """Boot.

        Args:
            suite: Debian's name.
            lower: file systems, the topmost first; the image itself is the last one.
            scratch: a folder for what is needed until the end.
            binds: further folders that the machine shall see, read-only: where → what.
            name: its host name.

        Raises:
            MachineError: it did not come up; holds its last words.
        """
        self.suite = suite
        self._files: list[str] = []
        self._boot: subprocess.Popen[bytes] | None = None
        if HERE_IT_IS:
            self.hybrid, self.pid = False, 1
            return
        self.hybrid = suite.startswith("bookworm") and Path("/sys/fs/cgroup/memory").exists()
        self.pid = 0
        self._log = scratch / "console.log"
        store = scratch / "store"
        store.mkdir(mode=0o755)
        places = {TESTS: ROOT / "tests", **(binds or {})}
        if agents := os.environ.get("CLOISTER_TEST_AGENTS"):
            places.setdefault(AGENTS, Path(agents))
        spec = {
            "name": name or suite,
            "lower": [str(folder) for folder in lower],
            "scratch": str(store),
            "hybrid": self.hybrid,
            "binds": [[str(outside), inside] for inside, outside in places.items()],
        }
        with self._log.open("wb") as log:
            self._boot = subprocess.Popen(
                [sys.executable, "-I", HERE / "machine_boot.py", json.dumps(spec)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0,
            )  # fmt: skip
        self._said = b""
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        """Return the machine."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.close()

    # ---- what is asked of it ----

    def run(  # noqa: PLR0913 (as subprocess.run)
        self,
        argv: Sequence[str],
        *,
        user: str = "root",
        input: str | bytes | None = None,  # noqa: A002 (as subprocess.run names it)
        check: bool = True,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
        text: bool = True,
    ) -> subprocess.CompletedProcess[Any]:
        """Run a command inside, and return what came of it: a user's login environment, standard input empty.

        Args:
            argv: the command.
            user: whose command it is.
            input: its standard input.
            check: whether a status other than 0 raises.
            cwd: where; the user's home by default.
            env: variables besides those of a login.
            timeout: seconds.
            text: whether output is text.

        Raises:
            MachineError: its status was not 0; holds its output.
            subprocess.TimeoutExpired: it was killed after the time.
        """
        if text and isinstance(input, bytes):
            input = input.decode()  # noqa: A001
        done: subprocess.CompletedProcess[Any] = subprocess.run(
            self.command(argv, user=user, cwd=cwd, env=env),
            capture_output=True, check=False, timeout=timeout, text=text,
            **({"stdin": subprocess.DEVNULL} if input is None else {"input": input}),
        )  # fmt: skip
        if check and done.returncode:
            raise MachineError(f"{list(argv)!r} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def popen(
        self,
        argv: Sequence[str],
        *,
        user: str = "root",
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """Start a command inside; `options` are those of subprocess.Popen.

        The process that is returned stands outside and reports the status of the one inside, which gets SIGKILL when
        it dies: signals for the command itself go to `inner`.
        """
        return subprocess.Popen(self.command(argv, user=user, cwd=cwd, env=env), **options)

    def python(self, code: str, *argv: str, **options: Any) -> subprocess.CompletedProcess[Any]:
        """Run Python code with Cloister's interpreter, in which `cloister` and `support` can be imported."""
        env = {"PYTHONPATH": TESTS, "PYTHONDONTWRITEBYTECODE": "1", **options.pop("env", {})}
        return self.run([PYTHON, "-c", code, *argv], env=env, **options)

    def command(
        self,
        argv: Sequence[str],
        *,
        user: str = "root",
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> list[str]:
        """Return the command on this host that runs `argv` inside, in a cgroup of visitors of no unit."""
        uid, gid, home, shell = self._account(user)
        variables = {"HOME": home, "USER": user, "LOGNAME": user, "SHELL": shell, "PATH": _PATH, "LANG": "C.UTF-8"}
        variables["TERM"] = "dumb"
        if self.path(f"/run/user/{uid}").exists():
            variables["XDG_RUNTIME_DIR"] = f"/run/user/{uid}"
        variables.update(env or {})
        # Else a visitor would hold what PID 1 has dropped: `date -s` in a test once set the clock of the host.
        identity = [f"--bounding-set={','.join(f'-{name}' for name in WITHHELD)}"]
        identity += [] if user == "root" else [f"--reuid={uid}", f"--regid={gid}", "--init-groups"]
        return [
            "sh", "-c", _ENTER, "sh", " ".join(self._files), "nsenter", "--target", str(self.pid), "--all", "--",
            "setpriv", *identity, "--pdeathsig=KILL", "--",
            "env", "-i", f"--chdir={cwd or home}", *(f"{key}={value}" for key, value in variables.items()), *argv,
        ]  # fmt: skip

    def inner(self, process: subprocess.Popen[Any], timeout: float = 5) -> int:
        """Return the pid, on this host, of the command that `popen` started."""
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        until = time.monotonic() + timeout
        while time.monotonic() < until and process.poll() is None:
            for pid in children.read_text(encoding="utf-8").split():
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                # Empty in the middle of execve(2). Before setpriv(1) is done, it would outlive who stands for it.
                if words[0] not in {b"", b"nsenter", b"setpriv"} and words[:2] != [b"env", b"-i"]:
                    return int(pid)
            time.sleep(0.002)
        raise MachineError("nothing was started inside")

    # ---- its files ----

    def path(self, inside: str) -> Path:
        """Return the path, on this host, of an absolute path inside. Absolute links in it lead out of the machine."""
        return Path(f"/proc/{self.pid}/root/{inside.lstrip('/')}")

    def write(self, path: str, text: str, mode: int = 0o644, owner: str = "root") -> None:
        """Write a file inside; folders that are missing are made, and are the owner's too."""
        uid, gid, _, _ = self._account(owner)
        target = self.path(path)
        missing = [folder for folder in target.parents if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(mode=0o755)
            os.chown(folder, uid, gid)
        target.write_text(text, encoding="utf-8")
        os.chown(target, uid, gid)
        target.chmod(mode)

    def read(self, path: str) -> str:
        """Return the text of a file inside."""
        return self.path(path).read_text(encoding="utf-8")

    def _account(self, user: str) -> tuple[int, int, str, str]:
        """Return uid, gid, home and shell of a user inside."""
        for line in self.read("/etc/passwd").splitlines():
            name, _, uid, gid, _, home, shell = line.split(":")
            if name == user:
                return int(uid), int(gid), home, shell
        raise MachineError(f"the machine has no user {user}")

    # ---- its systemd ----

    @property
    def version(self) -> int:
        """The version of its systemd."""
        return int(self.run(["systemctl", "--version"]).stdout.split()[1])

    @property
    def controllers(self) -> frozenset[str]:
        """The cgroup controllers that are really there: limits of others are accepted by systemd, and not in force."""
        if self.hybrid:
            shown = self.run(["cat", "/proc/self/cgroup"]).stdout.splitlines()
            return frozenset(name for line in shown for name in line.split(":")[1].split(",") if "=" not in name) - {""}
        return frozenset(self.read("/sys/fs/cgroup/cgroup.controllers").split())

    def journal(self, unit: str = "") -> str:
        """Return what a unit, or everything, has logged since the boot."""
        return str(self.run(["journalctl", "--no-pager", "--boot", *(["--unit", unit] if unit else [])]).stdout)

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return str(self.run(["systemctl", "show", "--value", "--property", name, unit]).stdout).strip()

    def wait_for(self, condition: str, timeout: float = 10) -> None:
        """Wait until a shell command succeeds inside."""
        until = time.monotonic() + timeout
        while self.run(["sh", "-c", condition], check=False).returncode:
            if time.monotonic() > until:
                raise MachineError(f"it never came to be: {condition}\n{self.journal()[-4000:]}")
            time.sleep(0.05)

    # ---- its power switch ----

    def reboot(self) -> None:
        """Shut down in order, boot again, and wait for that."""
        self.run(["systemctl", "reboot"], check=False)
        self._wait_until_ready()

    def cut(self) -> None:
        """Cut its power at once, switch it on again, and wait for the boot. What was written to files is there."""
        assert self._boot
        assert self._boot.stdin
        self._boot.stdin.write(b"cut\n")
        self._wait_until_ready()

    def close(self) -> None:
        """End it at once, with everything that runs in it; nothing is left."""
        if not self._boot:
            return
        if self._boot.stdin and not self._boot.stdin.closed:
            self._boot.stdin.close()
        try:
            self._boot.wait(15)
        except subprocess.TimeoutExpired:
            self._boot.kill()  # takes PID 1 along; the next machine removes its cgroups
            self._boot.wait()
        if self._boot.stdout:
            self._boot.stdout.close()

    def _wait_until_ready(self) -> None:
        """Read what the program says until systemd has finished its boot."""
        until = time.monotonic() + BOOT_S
        files: list[str] = []
        while True:
            word, _, rest = self._line(until).partition(" ")
            if word == "cgroup":
                files.append(rest)
            elif word == "up":
                self.pid, self._files = int(rest), files
            elif word == "ready" and int(rest) == self.pid and files:
                return
            elif word not in {"ready", "up"}:
                raise MachineError(f"{self.suite} did not boot: {word} {rest}\n{self.console()}")

    def _line(self, until: float) -> str:
        """Return the next line the program says."""
        assert self._boot
        assert self._boot.stdout
        while b"\n" not in self._said:
            ready, _, _ = select.select([self._boot.stdout], [], [], max(0, until - time.monotonic()))
            more = self._boot.stdout.read(4096) if ready else b""
            if not more:
                raise MachineError(f"{self.suite}: {'it ended' if ready else 'no answer'}\n{self.console()}")
            self._said += more
        line, _, self._said = self._said.partition(b"\n")
        return line.decode()

    def console(self) -> str:
        """Return the last of what PID 1 wrote before it had a journal."""
        return self._log.read_bytes()[-4000:].decode(errors="replace")
