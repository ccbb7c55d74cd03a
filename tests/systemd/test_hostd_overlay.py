"""Directories for changes and repositories that callers of hostd bring: the caller's own, or nothing is started."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hostd_rig import Rig

from support.machines import Machine

GOOD = [["J", {"receipt": {"exit": 0}}]]
PROJECT, COPY = "/home/alice/p/aside", "/home/alice/p/copy"
OVERLAY = {"kind": "overlay", "target": "@ROOT@", "base": "workspace"}
OWN = f"rm -rf {COPY}; mkdir -m 700 {COPY} {COPY}/upper {COPY}/work"


@pytest.fixture(scope="module")
def rig(machine: Machine) -> Iterator[Rig]:
    """Hostd and a broker's stand-in, for all tests of this file."""
    rig = Rig(machine)
    rig.start_broker()
    yield rig
    rig.close()


@pytest.fixture(autouse=True)
def places(rig: Rig) -> Iterator[None]:
    """A workspace of alice's, and a directory for its changes."""
    rig.machine.run(["sh", "-ec", f"mkdir -p {PROJECT}; echo old >{PROJECT}/file; {OWN}"], user="alice")
    yield
    rig.machine.run(["rm", "-rf", "/home/alice/p", "/srv/bobs"])


def answer(rig: Rig, script: str, root: dict[str, str], *mounts: dict[str, str]) -> None:
    """Have the broker answer with a plan that has `root` in the workspace's place, and further mounts."""
    plan = rig.plan(["/bin/sh", "-c", script], mounts=[*mounts])
    unit = plan["steps"][-1]["unit"]
    unit["mounts"] = [root if one.get("base") == "workspace" else one for one in unit["mounts"]]
    rig.answer(plan)


def test_changes_go_to_the_callers_directory(rig: Rig) -> None:
    """What the agent writes is there, and hers, and the workspace is as it was; a copy may also take its place."""
    answer(rig, "cat file; echo new >file", OVERLAY)
    done, printed, _ = rig.ask(PROJECT, "--copy", COPY)
    assert (done, printed) == (GOOD, "old\n"), rig.told()
    assert rig.machine.read(f"{PROJECT}/file") == "old\n"
    assert rig.machine.run(["stat", "-c", "%U %G", f"{COPY}/upper/file"]).stdout.split() == ["alice", "alice"]
    answer(rig, "cat file", {"kind": "rw", "target": "@ROOT@", "base": "copy", "source": "upper"})
    done, printed, _ = rig.ask(PROJECT, "--copy", COPY)
    assert (done, printed) == (GOOD, "new\n"), rig.told()


WRONG = {
    "no directory at all": "",
    "somebody else's": "chown bob {copy}",
    "open to others": "chmod 755 {copy}",
    "with an upper of bob's": "chown bob {copy}/upper",
    "with an upper that others may read": "chmod 750 {copy}/upper",
    "with a link for upper": "rmdir {copy}/upper; ln -s /srv/bobs {copy}/upper",
    "with a link for work": "rmdir {copy}/work; ln -s /srv/bobs {copy}/work",
    "with a file for upper": "rmdir {copy}/upper; touch {copy}/upper",
    "without work": "rmdir {copy}/work",
    "with a mount for upper": "mount -t tmpfs -o uid=1000,mode=700 none {copy}/upper",
}


@pytest.mark.parametrize("what", WRONG)
def test_no_other_directory_for_changes(rig: Rig, what: str) -> None:
    """One that is not the caller's alone, or leads elsewhere by a link or a mount, is refused, and nothing is left."""
    rig.machine.run(["sh", "-ec", "mkdir -p /srv/bobs; chown bob /srv/bobs; " + WRONG[what].format(copy=COPY)])
    answer(rig, "echo x >made", OVERLAY)
    try:
        assert rig.refusal(PROJECT, *(["--copy", COPY] if WRONG[what] else []))
        assert not rig.machine.run(["ls", "-A", "/srv/bobs"]).stdout
    finally:
        rig.machine.run(["umount", f"{COPY}/upper"], check=False)


def test_forged_marks_of_the_user_lead_nowhere(rig: Rig) -> None:
    """Marks that alice puts into her own upper directory show her agent nothing that is not hers in the workspace."""
    marks = (("redirect", "/../../../../root"), ("redirect", "/.."), ("metacopy", ""), ("origin", "x"))
    rig.machine.run(["mkdir", f"{COPY}/upper/d", f"{PROJECT}/d"], user="alice")
    for name, value in marks:
        code = f"import os; os.setxattr({COPY + '/upper/d'!r}, 'user.overlay.{name}', {value!r}.encode())"
        rig.machine.run(["python3", "-c", code], user="alice")
        answer(rig, "ls -A d 2>/dev/null; ls -A /root 2>/dev/null; true", OVERLAY)
        done, printed, _ = rig.ask(PROJECT, "--copy", COPY)
        assert (done, printed) == (GOOD, ""), (name, rig.told())


def test_a_repository_is_the_callers_and_below_a_root(rig: Rig) -> None:
    """One that hostd has walked to is mounted; bob's, and one below no root, are not there, and no plan can ask."""
    mount = {"kind": "rw", "base": "repository"}
    rig.machine.run(["mkdir", "-p", "/home/alice/p/git", "/home/alice/elsewhere/git"], user="alice")
    rig.machine.run(["sh", "-ec", "mkdir -p /srv/shared/git; chown bob /srv/shared/git; chmod 777 /srv/shared/git"])
    for place, good in (("/home/alice/p/git", True), ("/home/alice/elsewhere/git", False), ("/srv/shared/git", False)):
        answer(
            rig,
            f"touch {place}/made",
            {"kind": "rw", "target": "@ROOT@", "base": "workspace"},
            mount | {"target": place},
        )
        if good:
            assert rig.ask(PROJECT, "--repository", place)[0] == GOOD, rig.told()
        else:
            assert "no git directory elsewhere" in rig.refusal(PROJECT, "--repository", place)
        assert rig.machine.path(f"{place}/made").exists() == good
    rig.machine.run(["rm", "-rf", "/srv/shared", "/home/alice/elsewhere"])
