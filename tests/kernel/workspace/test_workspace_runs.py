"""Placeholders over the life of runs: shared, swept after a crash at any step, never taken from a person."""

from __future__ import annotations

import os
import signal

import pytest
from workspace_box import as_owner, host, names, snapshot, works

from cloister.errors import RetryError, StepError
from cloister.host import placeholders

pytestmark = pytest.mark.kernel


def test_git_on_the_host_works_during_a_run(clone, place):
    """While a run is on, host git neither sees the placeholders nor fails, and the run sees host commits."""
    made = clone.start("run")
    agent = clone.spawn(made, place / "contents", "read line; git log --oneline")
    said = host(
        clone.root, "git status --porcelain; echo n > n; git add -A; git commit -qm during; git ls-files"
    ).stdout
    agent.stdin.write("go\n")
    out = agent.communicate(timeout=30)[0]
    clone.end("run")

    assert said.split() == ["a", "n"]
    assert "during" in out
    assert host(clone.root, "git status --porcelain").stdout == ""


def test_nothing_is_left_behind(clone, place):
    """After a run the workspace holds what it held before, byte for byte by name."""
    before = snapshot(clone.root)

    works(clone, place, "true")

    assert snapshot(clone.root) == before
    assert clone.journal.records() == []


def test_placeholders_survive_a_kill_and_are_swept(clone, place):
    """After SIGKILL in the middle, the next start's sweep removes every placeholder, and only those."""
    before = snapshot(clone.root)
    child = os.fork()
    if child == 0:  # pragma: no cover
        try:
            clone.start("killed")
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.waitpid(child, 0)
    assert snapshot(clone.root) != before
    (clone.root / ".vscode/mine").write_text("x")

    with as_owner():
        left = clone.journal.sweep(lambda _run: False)

    assert left == [f"{clone.root}/.vscode"]
    (clone.root / ".vscode/mine").unlink()
    (clone.root / ".vscode").rmdir()
    assert snapshot(clone.root) == before


@pytest.mark.parametrize("point", range(6))
def test_every_step_of_making_can_be_killed(clone, monkeypatch, point):
    """Killed before the journal is written, before or after any placeholder is made: a sweep leaves nothing."""
    before = snapshot(clone.root)
    if (child := os.fork()) == 0:  # pragma: no cover
        create = placeholders._create
        calls = iter(range(point))

        def die_later(base, record):
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return create(base, record)

        try:
            monkeypatch.setattr(placeholders, "_create", die_later)
            clone.start("killed")
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert len(snapshot(clone.root)) == len(before) + point

    with as_owner():
        assert clone.journal.sweep(lambda _run: False) == []

    assert snapshot(clone.root) == before
    assert clone.journal.records() == []


def test_a_placeholder_made_but_not_recorded_is_swept(clone):
    """A crash between making a placeholder and writing its inode down is cleaned up by what it is."""
    before = snapshot(clone.root)
    clone.start("killed")
    with clone.journal._locked() as records:
        for record in records:
            record.dev = record.ino = 0

    with as_owner():
        clone.journal.sweep(lambda _run: False)

    assert snapshot(clone.root) == before


def test_many_runs_at_once_leave_nothing(clone):
    """Processes that start and end runs in one workspace at the same time never miss a placeholder, and leave none."""
    before = snapshot(clone.root)
    children = []
    for number in range(4):
        if (child := os.fork()) == 0:  # pragma: no cover
            status = 1
            try:
                for turn in range(15):
                    made = clone.start(f"{number}-{turn}")
                    missing = [mount for mount in made.mounts if not os.path.lexists(mount.target)]
                    clone.end(f"{number}-{turn}")
                    if missing:
                        break
                else:
                    status = 0
            finally:
                os._exit(status)
        children.append(child)

    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert snapshot(clone.root) == before
    assert clone.journal.records() == []


def test_an_unreadable_journal_stops_the_start(clone, place):
    """A journal that is no journal is an error with a remedy, not an empty one."""
    for text, remedy in (("{\n", "rm "), ("", "chown ")):
        (place / "state/placeholders.jsonl").write_text(text)
        os.chmod(place / "state/placeholders.jsonl", 0o666 if text else 0)
        with pytest.raises(StepError) as stopped:
            clone.start("run")
        assert remedy in stopped.value.remedy


def test_a_journal_that_grows_is_cut(clone, place, monkeypatch):
    """Under constant use the journal drops old states and keeps what is in use."""
    monkeypatch.setattr(placeholders, "MAX_JOURNAL_BYTES", 1)
    before = snapshot(clone.root)
    clone.start("one")
    clone.start("two")

    assert (place / "state/placeholders.jsonl").read_bytes().count(b"\n") == 1
    clone.end("one")
    clone.end("two")
    assert snapshot(clone.root) == before


def test_a_journal_cut_off_by_a_crash_is_read_up_to_there(clone, place):
    """A last line without its end is ignored and removed; the state before it counts."""
    before = snapshot(clone.root)
    clone.start("run")
    known = [record.path for record in clone.journal.records()]
    with (place / "state/placeholders.jsonl").open("a") as file:
        file.write('[{"base":')

    assert [record.path for record in clone.journal.records()] == known
    clone.end("run")
    assert snapshot(clone.root) == before


def test_two_runs_share_placeholders(clone, place):
    """The first of two runs to end leaves the other's protection in place; the second cleans up."""
    before = snapshot(clone.root)
    clone.start("one")
    second = clone.start("two")
    agent = clone.spawn(
        second, place / "contents", "read line; echo x > .vscode/x || echo x > .mcp.json || echo x > .git/commondir"
    )
    assert clone.end("one") == []
    assert (clone.root / ".vscode").exists()
    agent.stdin.write("go\n")
    agent.communicate(timeout=30)

    assert agent.returncode != 0
    assert clone.end("two") == []
    assert snapshot(clone.root) == before


def test_two_runs_outside_of_a_repository_share_the_git_that_is_none(plain, place):
    """An empty `.git` of one run is no repository to the next: it is shared, so no end opens a way for hooks."""
    before = snapshot(plain.root)
    plain.start("one")
    second = plain.start("two")
    agent = plain.spawn(
        second, place / "contents", "read line; mkdir -p .git/hooks && echo x > .git/hooks/post-checkout"
    )
    assert plain.end("one") == []
    assert (plain.root / ".git").exists()
    agent.stdin.write("go\n")
    agent.communicate(timeout=30)

    assert agent.returncode != 0
    assert not (plain.root / ".git/hooks").exists()
    assert plain.end("two") == []
    assert snapshot(plain.root) == before


def test_what_a_person_put_in_the_way_stays(clone):
    """A placeholder that was replaced by somebody's file is not removed."""
    clone.start("run")
    (clone.root / ".mcp.json").unlink()
    (clone.root / ".mcp.json").write_text("{}")
    (clone.root / ".git/commondir").unlink()
    (clone.root / ".git/commondir").write_text("./\n")

    clone.end("run")

    assert (clone.root / ".mcp.json").exists()
    assert (clone.root / ".git/commondir").exists()


def test_a_link_that_appears_before_mounting_is_refused(clone, place):
    """A link planted between looking and making stops the start, and nothing stays behind."""
    made = clone.plan()
    (clone.root / ".vscode").symlink_to(place / "outside")
    before = snapshot(clone.root)

    with as_owner(), pytest.raises(RetryError):
        clone.journal.make("run", made.placeholders)

    assert snapshot(clone.root) == before
    assert names(place / "outside") == set()


def test_a_swapped_workspace_is_refused(clone, place):
    """A directory that takes the workspace's place between looking and making gets nothing."""
    made = clone.plan()
    clone.root.rename(place / "moved")
    clone.root.mkdir()

    with as_owner(), pytest.raises(RetryError):
        clone.journal.make("run", made.placeholders)

    assert names(clone.root) == set()
