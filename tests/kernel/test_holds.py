"""What is held in the workspace before bubblewrap starts: as strong as bubblewrap's own mounts, and locked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from shim_rig import Rig, Run, rig_of_test

from cloister.host import frames
from cloister.host.owner import identify
from cloister.runs.explain import Explainer, Seen
from cloister.runs.paths import locate
from cloister.runs.prepare import Kitchen
from cloister.runs.request import RunRequest
from support.cloister import BASE, User

pytestmark = pytest.mark.kernel
rig = pytest.fixture(rig_of_test)

NESTED = BASE + "\n[agents.shell.hardening]\nnested = true\n"
ESCAPES = (
    "umount .vscode",
    "umount -l .vscode",
    "umount .git/hooks",
    "mount -o remount,bind,rw .vscode",
    "mount -o remount,bind,rw .git/hooks",
    "mount --move .vscode /tmp/moved",
    "mount --bind /tmp/empty .vscode && umount .vscode && umount .vscode",
    "mount --make-private .vscode && umount .vscode",
    "mv .vscode elsewhere",
    "mv .git elsewhere",
    "rmdir .vscode",
    "rm -f .git/config",
)


def test_the_agent_cannot_take_a_hold_away(user: User, workspace: Path) -> None:
    """With every capability in a user namespace of its own, it can neither unmount, remount, move nor rename one."""
    user.write_policy(NESTED)
    tries = "; ".join(f"({escape}) 2>/dev/null && echo ESCAPED: '{escape}'" for escape in ESCAPES)
    script = f"mkdir /tmp/empty /tmp/moved; {tries}; touch .vscode/x .git/hooks/x .env 2>&1; echo tried"
    done = user.run(
        "run", "shell", "--", "unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, cwd=workspace
    )
    assert "tried" in done.stdout, done.stderr
    assert "ESCAPED" not in done.stdout
    assert done.stdout.count("Read-only file system") == 3
    assert not (workspace / ".vscode").exists()


def test_an_agent_with_namespaces_can_use_them(user: User, workspace: Path) -> None:
    """The twin: the same agent mounts and unmounts what is its own, and writes where it may."""
    user.write_policy(NESTED)
    script = "mkdir own && mount -t tmpfs none own && touch own/x && umount own && rmdir own && echo fine >made"
    done = user.run(
        "run", "shell", "--", "unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, cwd=workspace
    )
    assert done.returncode == 0, done.stderr
    assert (workspace / "made").read_text() == "fine\n"


def test_both_ways_of_mounting_protect_the_same(user: User, workspace: Path) -> None:
    """Where the host allows no holds, bubblewrap mounts the same things: every path has the same answer."""
    paths = locate({**user.environment}, str(user.home), os.getuid())
    request = RunRequest(
        agent="shell", words=("true",), replaced=True, directory=str(workspace), environment={"PATH": "/usr/bin"}
    )  # fmt: skip
    answers = []
    for holds in (True, False):
        kitchen = Kitchen(paths, identify(str(user.home)), writes=False)
        kitchen._holds = holds
        plan = kitchen.prepare(request, "0000000000").plan
        assert bool(plan.launch.holds) == holds
        explainer = Explainer(plan, lambda _: Seen("directory", readable=True, writable=True))
        held = [mount.target for mount in kitchen.prepare(request, "0000000000").layout.mounts]
        asked = [*held, *(f"{target}/below" for target in held), str(workspace), f"{workspace}/README"]
        answers.append({path: explainer.ask(path) for path in asked})
    assert answers[0] == answers[1]
    assert not answers[0][f"{workspace}/.vscode"].writable
    assert answers[0][f"{workspace}/README"].writable


def test_this_host_holds(user: User, workspace: Path) -> None:
    """Where the trial works, a run's plan holds the protected paths and bubblewrap binds the workspace once."""
    plan = user.run("plan", "--json", "shell", cwd=workspace).stdout
    assert '"holds"' in plan
    assert plan.count(f'"{workspace}/.vscode"') == 1


class Held(Run):
    """A run with holds."""

    def launch(self) -> None:
        """Send `B` with its fifth list."""
        payload = frames.encode_u32(self.flags)
        for words in (self._argv, (), (), (), self.holds):
            payload += frames.encode_list(os.fsencode(word) for word in words)
        self.outer.send("B", payload, [self._inner_end.fileno()])
        self._inner_end.close()


def held(rig: Rig, *holds: str) -> str:
    """Run a shell that looks at two files of the work directory; return what it and the shim printed."""
    for name in ("first", "second"):
        (rig.work / name).write_text(name)
        if os.getuid() == 0:
            os.chown(rig.work / name, 4242, 4242)
    argv = ["/usr/bin/bwrap", "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/", "--dev", "/dev", "--bind"]
    script = "cat first second; echo new >first; echo new >second"
    Held.holds = holds
    run = Held(rig, argv=[*argv, str(rig.work), str(rig.work), "--chdir", str(rig.work), "sh", "-c", script])
    while run.process.poll() is None:
        run.turn()
    out, errors = run.process.communicate(timeout=30)
    return (out + errors).decode()


def test_a_hold_shows_another_file_and_refuses_writing(rig: Rig) -> None:
    """`ro` with a source shows that source; what is not held beside it is written as ever."""
    text = held(rig, "ro", str(rig.work / "second"), str(rig.work / "first"))
    assert text.startswith("secondsecond")
    assert "first: Read-only file system" in text
    assert (rig.work / "first").read_text() == "first"
    assert (rig.work / "second").read_text() == "new\n"


def test_a_hold_never_follows_a_link(rig: Rig) -> None:
    """A link that was put in the way after the plan was made ends the run; nothing is mounted elsewhere."""
    (rig.work / "link").symlink_to("first")
    text = held(rig, "ro", "", str(rig.work / "link"))
    assert "cannot protect the workspace: Too many levels of symbolic links [launch-failed]" in text
    assert (rig.work / "first").read_text() == "first"


def test_an_unknown_mode_is_refused(rig: Rig) -> None:
    """A mode that this shim does not know must not pass for a weaker one."""
    assert "cannot protect the workspace: Invalid argument" in held(rig, "none", "", str(rig.work / "first"))
