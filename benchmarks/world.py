"""The world of a benchmark: a made-up user with a policy and a project, and the commands of this machine.

Each `World` has its own home and broker. Processes are counted by user id, so nothing else may run
under it: `tools/bench` sees to that when it is root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.report import Host

AGENT = '[agents.{name}]\npreset = "shell"\nenvironment_audit = false\n'


class World:
    """One user: home, project, policy, broker."""

    def __init__(self, name: str, policy: str = "") -> None:
        """Make the home and a project that is a git repository; start nothing."""
        self.home = Path(os.environ["HOME"]) / name
        self.project = self.home / "src/project"
        self.runtime = Path(tempfile.mkdtemp(prefix="cl-"))
        self.environment = {**os.environ, "HOME": str(self.home), "XDG_RUNTIME_DIR": str(self.runtime)}
        (self.home / ".config/cloister").mkdir(parents=True)
        self.write_policy(policy or "schema = 1\n\n" + AGENT.format(name="shell"))
        self.project.mkdir(parents=True)
        (self.project / "README").write_text("a project\n")
        subprocess.run(["git", "init", "-q"], cwd=self.project, env=self.environment, check=True)

    def write_policy(self, text: str) -> None:
        """Replace the policy."""
        path = self.home / ".config/cloister/cloister.toml"
        path.write_text(text)
        path.chmod(0o600)

    def timed(self, argv: Sequence[str]) -> Callable[[], float]:
        """Return a case: start a command in the project, wait for it, return milliseconds.

        The case raises CalledProcessError when the command fails: a fast failure is no result.
        """
        program = shutil.which(argv[0], path=self.environment["PATH"]) or argv[0]
        null = os.open(os.devnull, os.O_RDWR)
        actions = [(os.POSIX_SPAWN_DUP2, null, descriptor) for descriptor in (0, 1, 2)]

        def case() -> float:
            os.chdir(self.project)
            started = time.perf_counter()
            pid = os.posix_spawn(program, list(argv), self.environment, file_actions=actions)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            taken = time.perf_counter() - started
            if status:
                raise subprocess.CalledProcessError(status, list(argv))
            return taken * 1000

        return case

    def charged(self, argv: Sequence[str]) -> Callable[[], tuple[float, float]]:
        """Return a case that tells milliseconds of CPU instead: of the command with all it started, and of the broker.

        Waiting for a busy machine does not count in it, so it is steadier than the clock.
        """
        program = shutil.which(argv[0], path=self.environment["PATH"]) or argv[0]
        null = os.open(os.devnull, os.O_RDWR)
        actions = [(os.POSIX_SPAWN_DUP2, null, descriptor) for descriptor in (0, 1, 2)]

        def case() -> tuple[float, float]:
            os.chdir(self.project)
            before = self._broker_ms()
            pid = os.posix_spawn(program, list(argv), self.environment, file_actions=actions)
            _, status, used = os.wait4(pid, 0)
            if status:
                raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), list(argv))
            return (used.ru_utime + used.ru_stime) * 1000, self._broker_ms() - before

        return case

    def _broker_ms(self) -> float:
        pid = self.broker
        # Nanoseconds on a CPU: Documentation/scheduler/sched-stats.rst.
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e6 if pid else 0.0

    @property
    def broker(self) -> int:
        """The broker's process id; 0 when there is none."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.runtime / "cloister/broker.lock").read_text())
        return 0

    def stop_broker(self) -> None:
        """End the broker and wait for it."""
        if pid := self.broker:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
                while (Path("/proc") / str(pid)).exists():
                    time.sleep(0.01)

    def close(self) -> None:
        """End the broker, remove the runtime directory."""
        self.stop_broker()
        shutil.rmtree(self.runtime, ignore_errors=True)


def host(commands: dict[str, Sequence[str]]) -> Host:
    """Describe the machine without naming it; `commands` print the versions of what is compared."""
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    processor = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        os.uname().machine,
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = {name: version(argv) for name, argv in commands.items()}
    return Host(
        os.uname().release.partition("-")[0], processor, len(os.sched_getaffinity(0)), round(memory / 2**30),
        release.get("PRETTY_NAME", "Linux").strip('"'), {name: text for name, text in versions.items() if text},
    )  # fmt: skip


def version(argv: Sequence[str]) -> str:
    """Return the first word with a digit that a command prints, or nothing."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    words = (done.stdout + done.stderr).split()
    return next((word.strip(",v") for word in words if word.strip(",v")[:1].isdigit()), "")
