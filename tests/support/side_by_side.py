"""One user with two agents, `namespace` and `microvm`, that differ in their isolation only, in projects that are alike.

What is asked of one is asked of both, and answers are compared once names that must differ are taken out of them.
"""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from pathlib import Path
from typing import NamedTuple

from support.cloister import User
from support.guest_user import BOOT_S, Installs
from support.homes import make_home, make_workspace

SIDES = ("namespace", "microvm")
_AGENT = '[agents.{side}]\npreset = "shell"\nenvironment_audit = false\ncommand = ["/bin/sh"]\nisolation = "{side}"\n'
_GUEST = '[agents.microvm.microvm]\nimage = "test"\nmemory = "256M"\nwarm = false\n'
_PAST_NS = 1_600_000_000_111_111_111


class Answer(NamedTuple):
    """What a caller gets."""

    code: int
    out: bytes
    err: bytes


class Pair:
    """The two sides. `runs` has the id of each one's living run, once `live` was called."""

    def __init__(self, folder: Path, image: Installs) -> None:
        """Make home, projects and policy; start nothing."""
        home = make_home(folder / "home")
        agents = "\n".join(_AGENT.format(side=side) for side in SIDES)
        self.user = User(home, f"schema = 1\n\n{agents}\n{_GUEST}")
        image.install(home)
        self.projects = {side: make_workspace(home / side / "project") for side in SIDES}
        self.runs: dict[str, str] = {}
        for project in self.projects.values():
            _fill(project)

    def live(self) -> None:
        """Start a run on each side that stays."""
        for side in SIDES:
            answer = self.call(side, "run", "--detach", side, "--", "/bin/sh", "-c", "echo output; exec sleep 600")
            assert answer.code == 0, answer
            self.runs[side] = self.user.records()[-1]["id"]

    def call(self, side: str, *words: str, shell: str = '"$@"', stdin: bytes = b"", below: str = "") -> Answer:
        """Run `cloister WORDS` in a side's project; `shell` is a line of bash around it."""
        done = subprocess.run(
            ["/bin/bash", "-c", shell, "bash", *self.user.command(*words)], input=stdin, capture_output=True,
            cwd=self.projects[side] / below, env=self.user.environment, timeout=BOOT_S, check=False,
        )  # fmt: skip
        return Answer(done.returncode, self.same(side, done.stdout), self.same(side, done.stderr))

    def exec(self, side: str, *words: str, shell: str = '"$@"', stdin: bytes = b"") -> Answer:
        """Run a command in a side's living run."""
        return self.call(side, "exec", self.runs[side], "--", *words, shell=shell, stdin=stdin)

    def both(self, *words: str, shell: str = '"$@"', stdin: bytes = b"") -> tuple[Answer, Answer]:
        """Run a command in both living runs."""
        first, second = (self.exec(side, *words, shell=shell, stdin=stdin) for side in SIDES)
        return first, second

    def views(self, scripts: dict[str, str]) -> dict[str, dict[str, str]]:
        """Run shell scripts in both living runs, all in one go; return by side what each printed and its exit code."""
        program = (
            "import json, subprocess, sys\n"
            "def ask(text):\n"
            "    done = subprocess.run(['/bin/sh', '-c', text], capture_output=True, stdin=subprocess.DEVNULL)\n"
            "    return f'{done.returncode} {(done.stdout + done.stderr).decode(errors=\"backslashreplace\")}'\n"
            "print(json.dumps({name: ask(text) for name, text in json.load(sys.stdin).items()}))\n"
        )
        found = {}
        for side in SIDES:
            answer = self.exec(side, "python3", "-c", program, stdin=json.dumps(scripts).encode())
            assert answer.code == 0, answer
            found[side] = json.loads(answer.out)
        return found

    def same(self, side: str, text: bytes) -> bytes:
        """Return text without what must differ: the project's path, the agent's name, ids of runs."""
        text = text.replace(str(self.projects[side]).encode(), b"PROJECT")
        text = re.sub(rb"(AGENT=|agents\.|project/|/)(namespace|microvm)\b", rb"\1SIDE", text)
        return re.sub(rb"\b1[0-9a-hjkmnp-tv-z]{11}\b", b"RUN", text)

    def tree(self, side: str) -> dict[bytes, tuple[str, int, bytes, int]]:
        """Return kind and mode, size, content and time of change of everything in a side's project; git's own aside."""
        root = os.fsencode(self.projects[side])
        found = {}
        for place, directories, files in os.walk(root):
            if b".git" in directories:
                directories.remove(b".git")
            for name in (*directories, *files):
                path = os.path.join(place, name)
                about = os.lstat(path)
                if stat.S_ISLNK(about.st_mode):
                    entry = ("link", 0, os.readlink(path), 0)
                elif stat.S_ISDIR(about.st_mode):
                    entry = (stat.filemode(about.st_mode), 0, b"", 0)
                else:
                    content = Path(os.fsdecode(path)).read_bytes()[:4096]
                    time_ns = about.st_mtime_ns if about.st_mtime_ns < _PAST_NS + 10**9 else 0  # of today: not the same
                    entry = (stat.filemode(about.st_mode), about.st_size, content, time_ns)
                found[path[len(root) + 1 :]] = entry
        return found


def _fill(project: Path) -> None:
    """Put into a project what projects have: links, modes, times, names that are no text, holes."""
    (project / "sub/deep").mkdir(parents=True)
    for name, text, mode in (
        ("sub/f", "f\n", 0o644), ("sub/deep/g", "g\n", 0o644), ("script", '#!/bin/sh\necho script "$@"\n', 0o755),
        ("no-interpreter", "#!/no/such\n", 0o755), ("data", "data\n", 0o644), ("read-only", "r\n", 0o444),
        ("private", "p\n", 0o600), ("empty", "", 0o644), ("two\nlines", "odd\n", 0o644), ("\udcff\udcfe", "b\n", 0o644),
    ):  # fmt: skip
        (project / name).write_text(text)
        (project / name).chmod(mode)
    with (project / "holes").open("wb") as file:
        file.truncate(10 << 20)
    (project / "link").symlink_to("README")
    (project / "dangling").symlink_to("nowhere")
    (project / "second-name").hardlink_to(project / "data")
    (project / "empty-directory").mkdir()
    for place, _, files in os.walk(project):
        for name in files:
            if ".git" not in place.split("/"):
                os.utime(os.path.join(place, name), ns=(_PAST_NS, _PAST_NS), follow_symlinks=False)
