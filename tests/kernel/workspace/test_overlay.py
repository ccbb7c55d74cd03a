"""A run in overlay mode under a real kernel: review, apply and discard what an overlay's upper directory holds."""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from workspace_box import ENVIRONMENT, UID, as_owner, host, owner_argv

from cloister.host.overlay_apply import Permission, apply, discard
from cloister.host.overlay_review import open_review

pytestmark = pytest.mark.kernel

SWAP = """
import ctypes
exchange = ctypes.CDLL(None).renameat2
while True:
    exchange(-100, b"d", -100, b"trap", 2)
"""
"""Atomically exchanges a directory and a link (renameat2(2), RENAME_EXCHANGE) as fast as the machine can."""

NAMES = (".vscode", ".mcp.json", ".claude")


class Copy:
    """A workspace, and a run's copy of it."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.lower = place / "lower"
        self.since_ns = 0

    def act(self, command: str) -> None:
        """Run a shell command in the overlay, as the agent would."""
        time.sleep(0.03)
        self.since_ns = time.time_ns()
        time.sleep(0.03)
        mount = (
            "mount -t overlay overlay -o userxattr,lowerdir=lower,upperdir=upper,workdir=work merged && cd merged && "
        )
        argv = owner_argv("unshare", "-Ur", "-m", "sh", "-ec", mount + command)
        ended = subprocess.run(
            argv, cwd=self.place, env=ENVIRONMENT, capture_output=True, text=True, errors="replace", check=False
        )
        assert ended.returncode == 0, ended.stderr

    @contextmanager
    def review(self):
        """Open both sides as the owner."""
        with as_owner():
            sides = str(self.lower), str(self.place / "upper")
            with open_review(*sides, names=NAMES, since_ns=self.since_ns) as review:
                yield review

    def listed(self) -> list[tuple[str, str]]:
        """Return path and kind of change."""
        with self.review() as review:
            return [(change.path, change.op) for change in review.changes()]

    def apply(self, *paths: str, **allowed: bool) -> dict[str, str]:
        """Apply all changes or those at `paths`; return what was refused and why."""
        with self.review() as review:
            changes = [change for change in review.changes() if not paths or change.path in paths]
            done = apply(review, changes, Permission(**allowed))
        assert len(done) == len(changes)
        return {outcome.path: outcome.why for outcome in done if outcome.result == "refused"}

    def diff(self, path: str) -> str:
        """Return the difference of one path."""
        with self.review() as review:
            return next(review.diff(change) for change in review.changes() if change.path == path)


@pytest.fixture
def copy():
    """Give a workspace with a few files and an empty copy."""
    place = Path(tempfile.mkdtemp(prefix="cloister-overlay-", dir="/tmp"))
    place.chmod(0o755)
    os.chown(place, UID, UID)
    for name in ("lower", "upper", "work", "merged", "outside"):
        (place / name).mkdir()
        os.chown(place / name, UID, UID)
    made = Copy(place)
    host(
        made.lower,
        "echo a > a; echo b > b; mkdir d e; echo x > d/x; echo y > d/y; echo z > e/z; ln -s a link; chmod 755 b",
    )
    yield made
    subprocess.run(["chmod", "-R", "u+rwX", str(place)], check=False)  # overlayfs leaves its work directory with mode 0
    subprocess.run(["rm", "-rf", str(place)], check=True)


def names(directory: Path) -> list[str]:
    """Return the sorted names in a directory."""
    return sorted(entry.name for entry in directory.iterdir())


def test_an_untouched_copy_has_no_changes(copy):
    """Reading, and opening for writing without a change, are not changes."""
    copy.act("cat a; : >> a; ls -R; touch b")

    assert copy.listed() == []


def test_every_kind_of_change_is_seen(copy):
    """Added, modified, deleted, replaced, opaque directories, modes and links: each is one change."""
    copy.act("echo more >> a; rm b; rm -r d; mkdir d; echo n > d/n; rm -r e; echo f > e; ln -s x new; ln -snf b link")

    assert copy.listed() == [
        ("a", "modified"), ("b", "deleted"), ("d/n", "added"), ("d/x", "deleted"), ("d/y", "deleted"),
        ("e", "replaced"), ("link", "modified"), ("new", "added"),
    ]  # fmt: skip


def test_a_file_made_again_the_same_is_no_change(copy):
    """What is deleted and made again with the same content is not listed, also in an opaque directory."""
    copy.act("rm a; echo a > a; rm -r d; mkdir d; echo x > d/x; echo y > d/y")

    assert copy.listed() == []


def test_apply_makes_the_workspace_like_the_copy(copy):
    """After applying everything the workspace equals what the agent saw, and a second review finds nothing."""
    copy.act(
        "echo more >> a; rm b; rm -r d; mkdir -p d/new/er; echo n > d/new/er/n; rm -r e; echo f > e; chmod 640 e;"
        "ln -snf e link; mkdir empty; echo s > script; chmod 755 script; mv script bin"
    )

    assert copy.apply() == {}
    assert host(copy.lower, "find . -printf '%P %y %l\\n' | sort").stdout.split("\n") == [
        " d ", "a f ", "bin f ", "d d ", "d/new d ", "d/new/er d ", "d/new/er/n f ", "e f ", "empty d ", "link l e", "",
    ]  # fmt: skip
    assert (copy.lower / "a").read_text() == "a\nmore\n"
    assert stat.S_IMODE((copy.lower / "e").stat().st_mode) == 0o640
    assert stat.S_IMODE((copy.lower / "bin").stat().st_mode) == 0o755
    assert copy.listed() == []


def test_one_path_can_be_applied_alone(copy):
    """Applying one path makes the directories it needs and touches nothing else."""
    copy.act("echo more >> a; mkdir -p new/deep; echo 1 > new/deep/1; echo 2 > new/deep/2")

    assert copy.apply("new/deep/1") == {}
    assert (copy.lower / "new/deep/1").read_text() == "1\n"
    assert not (copy.lower / "new/deep/2").exists()
    assert (copy.lower / "a").read_text() == "a\n"


def test_differences_are_readable_and_safe_for_terminals(copy):
    """Text is shown as a unified diff with control characters escaped; other content is named."""
    copy.act(
        "printf 'a\\n\\033]52;c;x\\007\\342\\200\\256' > a; head -c 3000 /dev/zero > b;"
        "ln -s /etc/passwd l; mkdir dir; rm d/x"
    )

    shown = copy.diff("a")
    assert "\033" not in shown
    assert "+\\x1b]52;c;x\\x07\\u202e  [no newline at end of file]" in shown
    assert copy.diff("b") == "b: not text (2 bytes to 3000 bytes)\n"
    assert copy.diff("l") == "l: symbolic link to /etc/passwd (added)\n"
    assert copy.diff("dir") == "dir: directory (added)\n"
    assert copy.diff("d/x").endswith("@@ -1 +0,0 @@\n-x\n")


def test_set_user_id_does_not_leave_the_copy(copy):
    """Set-user-id and set-group-id bits are dropped on the way; the other bits stay."""
    copy.act("cp /bin/true tool; chmod 6755 tool; mkdir g; chmod 2775 g")

    assert copy.apply() == {}
    assert stat.S_IMODE((copy.lower / "tool").stat().st_mode) == 0o755
    assert stat.S_IMODE((copy.lower / "g").stat().st_mode) == 0o775


def test_a_closed_copy_is_opened_again(copy):
    """An agent that takes away all access to its root hides nothing; closed directories below are named."""
    copy.act("echo n > n; mkdir c; echo h > c/h; chmod 000 c .")

    assert ("n", "added") in copy.listed()
    assert copy.apply("n") == {}


def test_special_files_are_never_applied(copy):
    """FIFOs and sockets are listed and refused, even by force; reading them never blocks."""
    copy.act("mkfifo fifo; python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"sock\")'; rm a; mkfifo a")

    assert set(copy.apply(force=True, protected=True)) == {"fifo", "sock", "a"}
    assert (copy.lower / "a").read_text() == "a\n"


@pytest.mark.parametrize(
    "command",
    [
        "mkdir .vscode; echo x > .vscode/tasks.json",
        "mkdir -p sub/.vscode; echo x > sub/.vscode/tasks.json",
        "echo x > .mcp.json",
        "mkdir -p .git/hooks; echo x > .git/hooks/pre-commit",
        "mkdir .git; echo x > .git/config",
        "mkdir -p sub/.git; echo x > sub/.git/HEAD",
        "mkdir .git; ln -s ../../x .git/COMMIT_EDITMSG",
        "mkdir .git; ln -s a .git/index",
        "mkdir -p .git/rebase-merge; echo exec x > .git/rebase-merge/git-rebase-todo",
        "mkdir -p .git/objects/info; echo / > .git/objects/info/alternates",
        "mkdir objects refs; echo x > HEAD",
        "ln -s /etc/passwd out",
        "ln -s ../outside out",
        "mkdir s; ln -s ../../outside s/out",
    ],
)
def test_what_tools_load_is_applied_only_when_asked_for(copy, command):
    """Protected names, git's configuration and links that lead out are refused by default and applied on request."""
    copy.act(command)

    refused = copy.apply()
    assert refused
    assert all("--protected" in why for why in refused.values())
    assert not any((copy.lower / path).is_symlink() or (copy.lower / path).is_file() for path in refused)
    assert copy.apply(protected=True) == {}
    assert all((copy.lower / path).is_symlink() or (copy.lower / path).exists() for path in refused)


def test_a_commit_made_in_the_copy_can_be_applied(copy):
    """History made in overlay mode arrives with an ordinary apply: objects, references and index."""
    host(copy.lower, "git init -q; git add .; git commit -qm first")
    copy.act("git config --global safe.directory '*' 2>/dev/null || true; echo n > n; git add n; git commit -qm second")

    assert copy.apply() == {}
    assert host(copy.lower, "git fsck; git status --porcelain; git log --format=%s").stdout.split() == [
        "second",
        "first",
    ]


def test_a_forged_index_is_not_applied(copy):
    """An index that leads `git checkout` into .git is applied only when asked for."""
    host(copy.lower, "git init -q; git add .; git commit -qm first")
    forge = "d=open('.git/index','rb').read();open('.git/index','wb').write(d.replace(b'd/x',b'../')+b'')"
    copy.act(f'python3 -c "{forge}"')

    assert "forged" in copy.apply()[".git/index"]


def test_conflicts_are_refused_unless_forced(copy):
    """What the person changed since the run began is not overwritten or deleted, unless by force."""
    copy.act("echo agent > a; rm b; rm -r d; echo agent > new; echo agent > e/z")
    host(copy.lower, "echo person > a; echo person >> b; echo person > d/x; echo person > new")

    assert set(copy.apply()) == {"a", "b", "d", "new"}
    assert (copy.lower / "a").read_text() == "person\n"
    assert (copy.lower / "d/x").read_text() == "person\n"
    assert (copy.lower / "e/z").read_text() == "agent\n"
    assert copy.apply(force=True) == {}
    assert (copy.lower / "a").read_text() == "agent\n"
    assert not (copy.lower / "d").exists()


def test_a_change_between_review_and_apply_is_refused(copy):
    """What changed after the review was made is refused, also when nothing had changed before."""
    copy.act("echo agent > a; rm b")
    with copy.review() as review:
        changes = review.changes()
        (copy.lower / "a").write_text("person\n")
        (copy.lower / "b").write_text("person\n")
        refused = [outcome.path for outcome in apply(review, changes, Permission()) if outcome.result == "refused"]

    assert sorted(refused) == ["a", "b"]


def test_links_in_the_workspace_are_not_followed(copy):
    """Attack 14: a parent directory that is a link in the workspace, whoever made it, leads nowhere."""
    copy.act("echo agent > d/x; mkdir n; echo agent > n/f; echo agent > a")
    host(copy.lower, "mv d dd; ln -s ../outside d; ln -s ../outside n; rm a; ln -s ../outside/a a")

    copy.apply(force=True, protected=True)

    assert names(copy.place / "outside") == []


def test_swapping_a_directory_for_a_link_while_applying_leaks_nothing(copy):
    """Attack 2: a directory that flips between directory and link during many applies never redirects a write."""
    copy.act("for i in 1 2 3 4 5 6 7 8; do echo $i > d/new$i; done")
    (copy.place / "outside/new1").write_text("precious")
    (copy.lower / "trap").symlink_to(copy.place / "outside")
    swapping = subprocess.Popen(owner_argv("/usr/bin/python3", "-c", SWAP), cwd=copy.lower)
    try:
        with copy.review() as review:
            changes = [change for change in review.changes() if change.path.startswith("d/new")]
            done = [outcome for _ in range(100) for outcome in apply(review, changes, Permission(force=True))]
    finally:
        swapping.kill()
        swapping.wait()

    assert {outcome.result for outcome in done} == {"applied", "refused"}, "the race must have been run both ways"
    assert names(copy.place / "outside") == ["new1"]
    assert (copy.place / "outside/new1").read_text() == "precious"


def test_nothing_is_half_written(copy):
    """A file that cannot be copied leaves the old one in place and no temporary file."""
    copy.act("echo agent > a; chmod 000 a")
    with copy.review() as review:
        changes = review.changes()
        if os.geteuid() != 0:
            assert [outcome.result for outcome in apply(review, changes, Permission())] == ["refused"]

    assert (copy.lower / "a").read_text() == "a\n"
    assert names(copy.lower) == ["a", "b", "d", "e", "link"]


def test_names_that_are_not_text(copy):
    """Names with newlines, invalid UTF-8, 255 bytes, dashes and our own prefix are listed, shown and applied."""
    program = (
        "import os\nfor n in [b'\\xff', b'new\\nline', b'n'*255, b'-rf', b'.cloister-x', b' ']: open(n, 'w').write('x')"
    )
    copy.act(f'python3 -c "{program}"')

    assert copy.apply() == {}
    assert len(names(copy.lower)) == 11
    assert copy.listed() == []


def test_sparse_files_stay_sparse_and_hard_links_become_files(copy):
    """A large file full of holes is copied without filling them; hard links arrive as equal files."""
    copy.act("truncate -s 1G big; echo x | dd of=big bs=1 seek=500M conv=notrunc; echo h > h1; ln h1 h2")

    started = time.monotonic()
    assert copy.apply() == {}
    assert time.monotonic() - started < 5
    assert (copy.lower / "big").stat().st_size == 1 << 30
    assert (copy.lower / "big").stat().st_blocks * 512 < 1 << 20
    assert (copy.lower / "h1").read_text() == (copy.lower / "h2").read_text() == "h\n"


def test_deep_trees_are_named_and_discarded(copy):
    """A tree deeper than any path may be is refused by depth, and discard removes it all the same."""
    program = "import os\nfor _ in range(1500): os.mkdir('deepdeep'); os.chdir('deepdeep')"
    copy.act(f'python3 -c "{program}"; mkdir locked; mkdir locked/in; chmod 000 locked/in locked')

    refused = copy.apply()
    assert any("deep" in why for why in refused.values())
    with as_owner():
        discard(str(copy.place))
    assert not (copy.place / "upper").exists()
    assert not (copy.place / "work").exists()
    assert "a" in names(copy.lower)


def test_discard_follows_no_link(copy):
    """Discarding removes links, not what they point to."""
    (copy.place / "outside/precious").write_text("x")
    copy.act("ln -s ../../outside l; mkdir m; ln -s ../../outside m/l")

    with as_owner():
        discard(str(copy.place))

    assert (copy.place / "outside/precious").exists()
    assert (copy.lower / "a").exists()
