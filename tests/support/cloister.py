"""The installed `cloister`, as a user with a home of their own runs it. Starts real brokers and sandboxes.

Each `User` has its own home, runtime directory and policy, so its broker is its own as well;
`close` ends that broker. The runtime directory is short on purpose: a Unix socket's path holds
107 bytes (unix(7)).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BASE = """\
schema = 1

[agents.shell]
preset = "shell"
environment_audit = false
"""


class User:
    """One user of Cloister."""

    def __init__(self, home: Path, policy: str = BASE) -> None:
        """Write the policy; start nothing."""
        self.home = home
        self.runtime = Path(tempfile.mkdtemp(prefix="cl-", dir="/tmp"))
        self.runtime.chmod(0o700)
        self.environment = {
            "HOME": str(home),
            "PATH": os.environ.get("CLOISTER_TEST_PATH", "/usr/local/bin:/usr/bin:/bin"),
            "LANG": "C.UTF-8",
            "TERM": "dumb",
            "XDG_RUNTIME_DIR": str(self.runtime),
        }
        self.write_policy(policy)

    def write_policy(self, text: str) -> None:
        """Replace the policy file."""
        folder = self.home / ".config/cloister"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cloister.toml").write_text(text, encoding="utf-8")
        (folder / "cloister.toml").chmod(0o600)

    def command(self, *words: str) -> list[str]:
        """Return the argv of `cloister WORDS`."""
        return [sys.executable, "-m", "cloister", *words]

    def run(
        self, *words: str, cwd: Path, stdin: bytes = b"", timeout_s: float = 60, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `cloister WORDS` to its end; output is text with undecodable bytes escaped."""
        return subprocess.run(
            self.command(*words),
            cwd=cwd,
            env={**self.environment, **environment},
            input=stdin.decode("latin-1"),
            capture_output=True,
            encoding="utf-8",
            errors="backslashreplace",
            timeout=timeout_s,
            check=False,
        )

    def inside(
        self, script: str, *, cwd: Path, agent: str = "shell", timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell script in the sandbox of an agent."""
        return self.run("run", agent, "--", "/bin/sh", "-c", script, cwd=cwd, timeout_s=timeout_s)

    def start(self, *words: str, cwd: Path, **options: Any) -> subprocess.Popen[bytes]:
        """Start `cloister WORDS` and return at once."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return subprocess.Popen(self.command(*words), cwd=cwd, env=self.environment, **pipes)

    @property
    def state(self) -> Path:
        """Cloister's state directory of this user."""
        return self.home / ".local/state/cloister"

    def receipts(self) -> list[dict[str, Any]]:
        """Return all receipts, oldest first."""
        return [json.loads(path.read_text()) for path in sorted(self.state.glob("runs/*/receipt.json"))]

    def records(self) -> list[dict[str, Any]]:
        """Return all records, oldest first."""
        return [json.loads(path.read_text()) for path in sorted(self.state.glob("runs/*/run.json"))]

    def audited(self, kind: str, timeout_s: float = 10) -> list[dict[str, Any]]:
        """Wait for events of a kind in this user's audit log, and return them."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            lines = [line for path in self.state.glob("audit/*.jsonl") for line in path.read_bytes().splitlines(True)]
            events = [json.loads(line) for line in lines if line.endswith(b"\n")]
            if found := [event for event in events if event["kind"] == kind]:
                return found
            time.sleep(0.05)
        raise AssertionError(f"no {kind} in the audit log")

    def wait_running(self, count: int = 1, timeout_s: float = 20) -> list[dict[str, Any]]:
        """Wait until so many runs have their agent running; return their records."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            running = [record for record in self.records() if record["status"] == "running"]
            if len(running) >= count:
                return running
            time.sleep(0.02)
        raise AssertionError(f"no {count} running runs: {self.records()}")

    @property
    def broker_pid(self) -> int:
        """The broker's process id; 0 when there is none."""
        try:
            return int((self.runtime / "cloister/broker.lock").read_text() or 0)
        except FileNotFoundError:
            return 0

    def close(self) -> None:
        """End the broker, wait for it, and remove the runtime directory."""
        pid = self.broker_pid
        if pid:
            try:
                descriptor = os.pidfd_open(pid)
                os.kill(pid, signal.SIGTERM)
                wait_for(descriptor)
                os.close(descriptor)
            except ProcessLookupError:
                pass
        shutil.rmtree(self.runtime, ignore_errors=True)


def wait_for(pidfd: int, timeout_s: float = 15) -> None:
    """Wait until a process ends, without being its parent."""
    import select

    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(timeout_s * 1000), "the process did not end"


def descendants(words: Sequence[bytes]) -> list[int]:
    """Return processes of this user whose command line holds all `words`."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                line = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if all(word in line for word in words):
                found.append(int(folder.name))
    return found
