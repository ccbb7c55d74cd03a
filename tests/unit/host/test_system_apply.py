"""Carrying out an installation, in a folder: written down first, undone when it fails, continued when killed."""

import os
from pathlib import Path

import pytest

from cloister.errors import RetryError, StepError
from cloister.host.system_apply import RECORD, Applier, Record, read_record
from cloister.plan.system import (
    AnySystemStep,
    EditLines,
    InstallFile,
    MakeAccounts,
    MakeDirectory,
    MakeLink,
    ReloadManager,
    RemoveDirectory,
    RemoveFile,
    RemoveTree,
    RestartUnit,
    StartUnit,
    SystemPlan,
)
from cloister.plan.system_diff import Made, digest
from cloister.plan.unit import FIRST_UID, STATE, Account

pytestmark = pytest.mark.root
"""Root's part: what it makes and changes must be root's on every level, so as anybody else it refuses."""

ACCOUNT = Account(name="cl-pi-alice", uid=FIRST_UID, agent="pi", user="alice")
STEPS: tuple[AnySystemStep, ...] = (
    MakeAccounts(accounts=(ACCOUNT,), daemons=("cloister-proxy",)),
    MakeDirectory(path="/etc/x", mode=0o700),
    InstallFile(path="/etc/x/unit", text="[Unit]\n", mode=0o640),
    InstallFile(path="/etc/known", text="new\n", before="old\n"),
    MakeLink(path="/etc/x/bin", target="usr/bin"),
    EditLines(path="/etc/cron.deny", add=("cl-pi-alice",)),
    ReloadManager(),
    StartUnit(unit="x.socket"),
)
AFTER = Record(made=Made(files={"/etc/x/unit": digest("[Unit]\n")}, directories=("/etc/x",)), accounts=(ACCOUNT,))


class World:
    """A folder that stands for /, and the commands that were given."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.commands: list[list[str]] = []
        self.input = b""
        self.complaints: dict[str, str] = {}
        (root / "etc").mkdir()
        (root / "var/lib").mkdir(parents=True)
        (root / "etc/known").write_text("old\n")
        (root / "etc/known").chmod(0o644)
        (root / "etc/cron.deny").write_text("mallory\n")

    def command(self, words: list[str], data: bytes) -> str:
        """Take a command instead of running it."""
        self.commands.append(words)
        self.input = data or self.input
        return self.complaints.get(words[0], "")

    def applier(self, **options: object) -> Applier:
        """Return what is tried."""
        return Applier(root=str(self.root), command=self.command, **options)  # type: ignore[arg-type]

    def tree(self) -> dict[str, str]:
        """Return every path with its kind, mode and content."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            kind = os.readlink(path) if path.is_symlink() else "" if path.is_dir() else path.read_text()
            found[str(path.relative_to(self.root))] = f"{path.lstat().st_mode:o} {kind}"
        return found


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Return a fresh one."""
    root = tmp_path / "root"
    root.mkdir()
    return World(root)


def test_all_steps_are_done_and_what_is_ours_is_written_down(world: World) -> None:
    """Files with their modes, users by one call, systemd told: and the record says what is ours."""
    world.applier().apply(SystemPlan(steps=STEPS), Record(), AFTER)
    tree = world.tree()
    assert tree["etc/x"] == "40700 "
    assert tree["etc/x/unit"] == "100640 [Unit]\n"
    assert tree["etc/known"] == "100644 new\n"
    assert tree["etc/x/bin"] == "120777 usr/bin"
    assert tree["etc/cron.deny"].endswith("mallory\ncl-pi-alice\n")
    assert world.commands == [
        ["systemd-sysusers", "-"],
        ["systemctl", "--no-ask-password", "daemon-reload"],
        ["systemctl", "--no-ask-password", "start", "--", "x.socket"],
    ]
    assert f"u cl-pi-alice {FIRST_UID} ".encode() in world.input
    assert read_record(str(world.root)) == AFTER
    assert (world.root / RECORD.lstrip("/")).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("at", range(len(STEPS)))
def test_a_failing_step_has_all_before_it_undone(world: World, at: int) -> None:
    """Whichever step the host refuses: the folder is as it was, to the last mode, and there is no record."""
    before = world.tree()

    def refuse(number: int) -> None:
        if number == at:
            raise StepError("step-failed", "made up")

    with pytest.raises(StepError, match="made up"):
        world.applier(before_step=refuse).apply(SystemPlan(steps=STEPS), Record(), AFTER)
    assert world.tree() == before
    assert any(words[0] == "userdel" for words in world.commands) == (at > 0)
    assert read_record(str(world.root)) == Record()


def test_a_refusal_of_systemd_is_undone_too_and_told_in_its_words(world: World) -> None:
    """The step that failed is taken back as well: it may have got half way."""
    before = world.tree()
    world.complaints["systemctl"] = "Unit x.socket has a bad unit file setting."
    with pytest.raises(StepError) as caught:
        world.applier().apply(SystemPlan(steps=STEPS), Record(), AFTER)
    assert caught.value.reference == "undo-failed"  # systemd refuses that as well
    assert "bad unit file setting" in caught.value.message
    assert world.tree().keys() - before.keys() == {STATE.lstrip("/"), RECORD.lstrip("/")}
    assert read_record(str(world.root)).unfinished == STEPS, "the next application must know"


@pytest.mark.parametrize("at", range(len(STEPS) + 1))
def test_killed_anywhere_nothing_is_forgotten(world: World, at: int) -> None:
    """A killed process leaves a record that names everything it may have made, and the plan it was at."""

    class KilledError(BaseException):
        """Nothing of ours catches it, as nothing catches SIGKILL."""

    def die(number: int) -> None:
        if number == at:
            raise KilledError

    applier = world.applier(before_step=die)
    try:
        applier.apply(SystemPlan(steps=STEPS), Record(), AFTER)
    except KilledError:
        left = read_record(str(world.root))
        assert left.unfinished == STEPS
        assert set(left.made.files) == set(AFTER.made.files)
        assert left.accounts == (ACCOUNT,)
    else:
        assert read_record(str(world.root)) == AFTER


def test_each_step_may_be_done_twice(world: World) -> None:
    """What a killed application had done already is no obstacle."""
    applier = world.applier()
    for step in (
        *STEPS,
        *STEPS,
        RemoveFile(path="/gone", before=""),
        RemoveDirectory(path="/gone"),
        RemoveTree(path="/g"),
    ):
        applier.do(step)
    assert world.tree()["etc/cron.deny"].count("cl-pi-alice") == 1


def test_a_link_in_the_way_is_never_written_through(world: World) -> None:
    """A file is replaced by rename, so a link at its place, or at that of the new one, keeps what it leads to."""
    victim = world.root / "victim"
    victim.write_text("precious\n")
    for name in ("known", "known.cloister-new"):
        (world.root / "etc" / name).unlink(missing_ok=True)
        (world.root / "etc" / name).symlink_to(victim)
    world.applier().do(InstallFile(path="/etc/known", text="new\n"))
    assert victim.read_text() == "precious\n"
    assert (world.root / "etc/known").read_text() == "new\n"
    (world.root / "etc/x").symlink_to(world.root)
    with pytest.raises(StepError):
        world.applier().do(MakeDirectory(path="/etc/x", mode=0o777))
    assert world.root.stat().st_mode & 0o777 != 0o777


def test_a_directory_that_others_could_change_is_no_place_for_us(world: World) -> None:
    """Whoever can rename what is in it decides what root writes; a link on the way is refused as well."""
    (world.root / "etc").chmod(0o777)
    with pytest.raises(StepError) as caught:
        world.applier().do(InstallFile(path="/etc/unit", text="x"))
    assert caught.value.reference == "place-changeable"
    (world.root / "etc").chmod(0o755)
    (world.root / "etc/y").symlink_to(world.root / "var")
    with pytest.raises(StepError) as caught:
        world.applier().do(InstallFile(path="/etc/y/unit", text="x"))
    assert caught.value.reference == "place-changeable"
    world.applier().do(InstallFile(path="/etc/unit", text="x"))


def test_a_directory_with_something_in_it_stays(world: World) -> None:
    """Only what is empty is removed."""
    (world.root / "var/lib/data").mkdir()
    (world.root / "var/lib/data/history").write_text("words")
    world.applier().do(RemoveDirectory(path="/var/lib/data"))
    assert (world.root / "var/lib/data/history").exists()
    (world.root / "var/lib/data/history").unlink()
    world.applier().do(RemoveDirectory(path="/var/lib/data"))
    assert not (world.root / "var/lib/data").exists()


def test_two_at_once_do_not_mix(world: World) -> None:
    """The second is told to wait; after the first has ended it may."""
    with world.applier().locked():
        with pytest.raises(RetryError) as caught, world.applier().locked():
            pass
        assert caught.value.reference == "setup-in-use"
    with world.applier().locked():
        pass


def test_a_broken_record_is_not_taken_for_none(world: World) -> None:
    """Otherwise everything of ours would look like somebody else's, and numbers would be given again."""
    path = world.root / RECORD.lstrip("/")
    path.parent.mkdir()
    path.write_text('{"version": 1, "made": ')
    with pytest.raises(StepError) as caught:
        read_record(str(world.root))
    assert caught.value.reference == "record-unreadable"
    path.unlink()
    assert read_record(str(world.root)) == Record()


def test_interrupting_is_a_failure_that_is_undone(world: World) -> None:
    """Ctrl-C half way leaves nothing behind."""
    before = world.tree()

    def interrupt(number: int) -> None:
        if number == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.applier(before_step=interrupt).apply(SystemPlan(steps=STEPS), Record(), AFTER)
    assert world.tree() == before


def test_an_undone_change_leaves_an_installation_as_it_was(world: World) -> None:
    """The record of before stands again, and what ran is restarted from the old files."""
    world.applier().apply(SystemPlan(steps=STEPS), Record(), AFTER)
    before = world.tree()
    world.commands.clear()
    change = (
        InstallFile(path="/etc/x/unit", text="other\n", mode=0o600, before="[Unit]\n", before_mode=0o640),
        RestartUnit(unit="x.service"),
    )

    def refuse(number: int) -> None:
        if number == 1:
            raise StepError("step-failed", "made up")

    with pytest.raises(StepError, match="made up"):
        world.applier(before_step=refuse).apply(SystemPlan(steps=change), AFTER, Record())
    assert world.tree() == before
    assert world.commands[-1] == ["systemctl", "--no-ask-password", "daemon-reload"]
