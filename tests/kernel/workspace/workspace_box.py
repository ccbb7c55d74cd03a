"""Build workspaces and run commands in them under bubblewrap, from a layout; shared by the workspace tests.

Not the product's compiler: the argv here is the least that shows a layout's mounts. As root the
sandbox runs as uid 4242, because root inside would ignore file modes.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cloister.host.placeholders import Journal
from cloister.host.tripwires import look_after
from cloister.host.workspace_probe import probe_workspace
from cloister.isolation.workspace import Options, layout, wanted
from cloister.plan.workspace import Protected, WorkspaceLayout

UID = 4242 if os.geteuid() == 0 else os.geteuid()
PROTECTED = (
    Protected(".vscode", "directory"),
    Protected(".claude", "directory"),
    Protected(".mcp.json", content="{}"),
    Protected(".env"),
    Protected(".bashrc", when="present"),
)
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/nonexistent",
    "LC_ALL": "C",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b",
    "GIT_CONFIG_COUNT": "2",
    "GIT_CONFIG_KEY_0": "init.defaultBranch", "GIT_CONFIG_VALUE_0": "main",
    "GIT_CONFIG_KEY_1": "protocol.file.allow", "GIT_CONFIG_VALUE_1": "always",
}  # fmt: skip


@contextmanager
def as_owner() -> Iterator[None]:
    """Act on the file system as the workspace's owner."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(UID)
    os.seteuid(UID)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def owner_argv(*argv: str) -> list[str]:
    """Return argv that runs as the owner."""
    if os.geteuid() != 0:
        return list(argv)
    return ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", *argv]


def host(root: Path, command: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a shell command on the host, as the owner."""
    return subprocess.run(
        owner_argv("sh", "-ec", command), cwd=root, env=ENVIRONMENT, text=True, errors="replace", capture_output=True,
        check=check, timeout=60,
    )  # fmt: skip


class Box:
    """One workspace, its journal, and runs in it."""

    def __init__(self, root: Path, state: Path, protected: tuple[Protected, ...] = PROTECTED, **options) -> None:
        """Take an existing directory."""
        self.root = root
        self.protected = protected
        self.journal = Journal(str(state))
        self.options = Options(uid=UID, home=str(root.parent / "home"), **options)

    def plan(self) -> WorkspaceLayout:
        """Look at the workspace and lay it out."""
        with as_owner():
            facts = probe_workspace(
                str(self.root), wanted(self.protected, self.options), uid=UID, home=self.options.home
            )
        return layout(facts, self.protected, self.options)

    def start(self, run: str) -> WorkspaceLayout:
        """Lay out and make the placeholders of a run."""
        made = self.plan()
        with as_owner():
            self.journal.make(run, made.placeholders)
        return made

    def end(self, run: str) -> list[str]:
        """Remove the placeholders of a run."""
        with as_owner():
            return self.journal.release(run)

    def argv(self, made: WorkspaceLayout, contents: Path, command: str) -> list[str]:
        """Return bwrap's argv for a layout; content files are kept in `contents`."""
        out = ["bwrap", "--unshare-all", "--die-with-parent"]
        for place in ("/usr", "/bin", "/lib", "/lib64", "/etc"):
            if Path(place).exists():
                out += ["--ro-bind", place, place]
        out += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
        for number, mount in enumerate(made.mounts):
            if mount.op in {"bind", "pin"}:
                out += ["--bind", mount.source, mount.target]
            elif mount.op == "ro":
                out += ["--ro-bind", mount.source, mount.target]
            elif mount.op == "content":
                file = contents / f"content-{number}"
                file.write_text(mount.content)
                file.chmod(0o644)
                out += ["--ro-bind", str(file), mount.target]
            elif mount.node.kind == "directory":
                out += ["--perms", "0000", "--tmpfs", mount.target, "--remount-ro", mount.target]
            else:
                out += ["--ro-bind", "/dev/null", mount.target]
        return owner_argv(*out, "--chdir", str(self.root), "sh", "-c", command)

    def spawn(self, made: WorkspaceLayout, contents: Path, command: str) -> subprocess.Popen[str]:
        """Start a command in the sandbox."""
        return subprocess.Popen(
            self.argv(made, contents, command), env=ENVIRONMENT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, contents: Path, command: str, *, name: str = "run") -> subprocess.CompletedProcess[str]:
        """Run a command in the sandbox from start to end of a run."""
        made = self.start(name)
        try:
            return subprocess.run(
                self.argv(made, contents, command), env=ENVIRONMENT, text=True, errors="replace", check=False,
                timeout=60, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        finally:
            self.end(name)


def snapshot(root: Path) -> list[str]:
    """Return every name below a directory except git's own bookkeeping."""
    kept = []
    for where, names, files in os.walk(root):
        names[:] = [name for name in names if name not in {"objects", "logs", "refs"}]
        kept += [os.path.relpath(f"{where}/{name}", root) for name in [*names, *files]]
    return sorted(kept)


def names(directory: Path) -> set[str]:
    """Return the names in a directory."""
    return {entry.name for entry in directory.iterdir()}


def attack(box, place, command):
    """Run a command that must fail inside, and return what it said."""
    ended = box.run(place / "contents", command)
    assert ended.returncode != 0, ended.stdout
    return ended.stdout


def works(box, place, command):
    """Run a command that must succeed inside, and return what it said."""
    ended = box.run(place / "contents", command)
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def findings(box, made, since):
    """Return the suspicious paths after a run, relative to the workspace."""
    with as_owner():
        report = look_after(made, [entry.name for entry in box.protected], since_ns=since)
    assert report.complete
    return sorted(os.path.relpath(finding.path, box.root) for finding in report.findings)


def inner(agent) -> int:
    """Return the process id of the shell inside: the youngest descendant of bwrap."""
    pid = agent.pid
    while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        pid = int(children[-1])
    return pid
