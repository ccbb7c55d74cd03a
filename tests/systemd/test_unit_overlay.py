"""Changes of units that are kept aside: the workspace waits, only its user sees them, a hostile agent gains nothing.

Also what takes the place of an idmapped mount where a file system has none, and the repository of a linked worktree.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support import installed
from support.installed import PROJECT, Leftovers
from support.machines import PYTHON, Machine

POLICY = """\
schema = 1

[agents.shell]
isolation = "unit"
command = ["bash"]

[agents.aside]
isolation = "unit"
command = ["bash"]
workspace = { mode = "overlay" }

[agents.team]
isolation = "unit"
command = ["bash"]
unit = { project_group = "team" }

[users.alice]
agents = ["shell", "aside", "team"]
roots = ["~/src"]
"""
RUNS = "/home/alice/.local/state/cloister/runs"
OTHER = "/home/alice/src/plain"
"""A file system without idmapped mounts."""
PATIENCE_S = 30.0


@pytest.fixture(scope="module", params=["trixie", pytest.param("bookworm", marks=pytest.mark.slow)])
def host(request: pytest.FixtureRequest, layers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine on which alice may start agents whose changes are kept aside; on Debian 12 with the slow tests."""
    with Machine(request.param, layers(request.param), tmp_path_factory.mktemp(f"aside-{request.param}")) as machine:
        sh(machine, "groupadd team; usermod -aG team alice")
        installed.install(machine, POLICY)
        assert installed.run(machine, "echo works") == "works\n"
        yield machine


class LeftOfRuns(Leftovers):
    """What remains of runs, but for names in the project: the tests put those there."""

    def look(self) -> dict[str, list[str]]:
        """Return what is there."""
        return {kind: names for kind, names in super().look().items() if kind != "project"}


@pytest.fixture(autouse=True)
def project(host: Machine) -> Iterator[None]:
    """A project with a file and a directory; after each test nothing of its runs is left but their records."""
    sh(host, f"rm -rf {PROJECT}; mkdir -p {PROJECT}/sub; cd {PROJECT}; echo old >file; echo gone >sub/gone; "
       "chmod 0640 file", user="alice")  # fmt: skip
    left = LeftOfRuns(host)
    yield
    left.check()


def sh(host: Machine, script: str, **options: Any) -> str:
    """Run a shell script, by default as root; each of its commands must succeed."""
    return str(host.run(["sh", "-ec", script], **options).stdout)


def cloister(host: Machine, *words: str, cwd: str = PROJECT, **options: Any) -> subprocess.CompletedProcess[Any]:
    """Run alice's `cloister`, whatever comes of it."""
    return host.run(["cloister", *words], **{"user": "alice", "cwd": cwd, "check": False, **options})


def aside(host: Machine, script: str, **options: Any) -> subprocess.CompletedProcess[Any]:
    """Run a script as the agent whose changes are kept aside."""
    return cloister(host, "run", "aside", "--", "bash", "-c", script, **options)


def changes(host: Machine, run: str = "last", **options: Any) -> dict[str, dict[str, Any]]:
    """Return what a run changed, by path."""
    told = cloister(host, "diff", run, "--json", **options)
    assert told.returncode == 0, told.stderr
    return {one["path"]: one for one in json.loads(told.stdout)}


def seen(host: Machine, place: str = PROJECT) -> str:
    """Return names, modes, owners and contents of a workspace."""
    return str(host.run(["sh", "-c", 'cd "$0"; find . -printf "%p %M %U %G\\n" | sort; cat file', place]).stdout)


def test_changes_wait_until_they_are_applied(host: Machine) -> None:
    """The agent sees its changes, the workspace none; `diff` tells them, `apply` makes them, and they are alice's."""
    before = seen(host)
    done = aside(host, "id -un; echo new >file; rm -r sub; mkdir sub; echo made >sub/made; cat file; ls sub")
    assert (done.returncode, done.stdout.split()) == (0, ["cl-aside-alice", "new", "made"]), done.stderr
    assert seen(host) == before
    assert {path: one["op"] for path, one in changes(host).items() if one["kind"] != "directory"} == {
        "file": "modified", "sub/gone": "deleted", "sub/made": "added",
    }  # fmt: skip
    applied = cloister(host, "apply", "last")
    assert applied.returncode == 0, applied.stderr
    assert host.run(["sh", "-c", "cat file sub/made; ls sub"], cwd=PROJECT).stdout.split() == ["new", "made", "made"]
    owners = host.run(["find", PROJECT, "-printf", "%u:%g\n"]).stdout
    assert set(owners.split()) == {"alice:alice"}
    assert "overlay-gone" in cloister(host, "diff", "last").stderr


def test_discarded_changes_are_gone(host: Machine) -> None:
    """`discard` removes them all, whatever modes the agent gave its directories; the records stay."""
    aside(host, "mkdir -p a/b/c; echo x >a/b/c/d; chmod 0 a/b a")
    run = json.loads(cloister(host, "receipt", "last", "--json").stdout)["id"]
    assert host.path(f"{RUNS}/{run}/overlay/upper/a").exists()
    assert cloister(host, "discard", run).returncode == 0
    assert not host.path(f"{RUNS}/{run}/overlay").exists()
    assert host.path(f"{RUNS}/{run}/receipt.json").exists()


def test_gc_keeps_what_nobody_has_decided(host: Machine) -> None:
    """Changes stay until they are applied or discarded; with --overlays they go, the file system's own part too."""
    aside(host, "echo x >made")
    run = json.loads(cloister(host, "receipt", "last", "--json").stdout)["id"]
    time.sleep(1.1)
    assert cloister(host, "gc", "--older-than", "1s").returncode == 0
    assert host.path(f"{RUNS}/{run}/overlay/upper/made").exists()
    assert cloister(host, "gc", "--older-than", "1s", "--overlays").returncode == 0
    assert not host.path(f"{RUNS}/{run}").exists()


def test_a_project_may_ask_for_it(host: Machine) -> None:
    """What a workspace's own policy narrows to holds in a unit: its changes are kept aside."""
    host.write(f"{PROJECT}/.cloister.toml", 'schema = 1\n[every_agent.workspace]\nmode = "overlay"\n', owner="alice")
    done = cloister(host, "run", "shell", "--", "bash", "-c", "echo new >file")
    assert done.returncode == 0, done.stderr
    assert host.read(f"{PROJECT}/file") == "old\n"
    assert list(changes(host)) == ["file"]


# --- who sees what -------------------------------------------------------------------------------


def test_only_its_user_gets_to_the_changes(host: Machine) -> None:
    """While the run lives, neither another user nor the account itself finds them on the host; alice does."""
    run = cloister(host, "run", "-d", "aside", "--", "bash", "-c", "echo secret >made; exec sleep 4711").stdout.strip()
    place = f"{RUNS}/{run}/overlay/upper"
    host.wait_for(f"test -s {place}/made")
    for user in ("bob", "cl-aside-alice"):
        looked = host.run(["setpriv", f"--reuid={user}", "--clear-groups", "cat", f"{place}/made"], check=False)
        assert looked.returncode != 0, user
    assert host.run(["cat", f"{place}/made"], user="alice").stdout == "secret\n"
    assert host.path(f"{place}/made").stat().st_uid == 1000
    assert cloister(host, "diff", run).returncode != 0, "it is not over"
    cloister(host, "stop", run)


def test_what_is_not_the_users_stays_out_of_reach(host: Machine) -> None:
    """Files of root and of others in the workspace have the rights they have: copying reads or replaces none."""
    sh(host, "echo root >r; chmod 600 r; echo bob >b; chown bob b; chmod 644 b; chmod 1777 sub; echo x >sub/of-bob; "
       "chown bob sub/of-bob", cwd=PROJECT)  # fmt: skip
    done = aside(host, "cat r; cat b; echo x >>b; chmod 777 b; mv b c; chown $(id -u) b; cat sub/gone")
    assert done.stdout.split() == ["bob", "gone"]
    assert host.run(["cat", "r", "b"], cwd=PROJECT).stdout == "root\nbob\n"
    assert not [path for path in changes(host) if path in {"r", "b", "c"}]


ATTACK = r"""
import os, socket
def tried(what):
    try:
        what()
    except OSError as error:
        print(error.errno, end=" ")
    else:
        print("done", end=" ")
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def call(value):
    if value < 0:
        raise OSError(ctypes.get_errno(), "")
here = os.getcwd()
for what in (
    lambda: os.mknod("disk", 0o60666, os.makedev(254, 0)),
    lambda: os.mknod("whiteout", 0o20000, 0),
    lambda: os.setxattr("sub", "trusted.overlay.opaque", b"y"),
    lambda: os.setxattr("sub", "trusted.overlay.redirect", b"/../../.."),
    lambda: os.chmod("file", 0o4755),
    lambda: os.setxattr("file", "security.capability", b"\1\0\0\2\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
    lambda: call(libc.umount2(here.encode(), 2)),
    lambda: call(libc.mount(b"none", here.encode(), None, 32, None)),
    lambda: open("/proc/self/fd/41/file"),
):
    tried(what)
for name in ("user.overlay.opaque", "user.overlay.redirect", "user.overlay.metacopy", "user.overlay.whiteout"):
    try:
        os.setxattr("sub", name, b"/../../../etc")
        os.setxattr("file", name, b"/../../../etc")
    except OSError:
        pass
os.mkfifo("pipe")
socket.socket(socket.AF_UNIX).bind("socket")
os.symlink("/etc/shadow", "link")
os.symlink("/home/alice/.ssh", ".ssh")
os.makedirs(".git/hooks", exist_ok=True)
open(".git/hooks/pre-commit", "w").write("#!/bin/sh\n")
open("new\nname\x1b[31m", "w").write("x")
place = "deep"
for _ in range(90):
    os.mkdir(place, 0o700)
    os.chdir(place)
    place = "d"
os.chdir(here)
os.mkdir("closed")
open("closed/in", "w").close()
os.chmod("closed", 0)
open("huge", "w").truncate(1 << 40)
"""


def test_a_hostile_agent_is_reviewed_like_any_other(host: Machine) -> None:
    """No device, whiteout, set-id bit or mark of overlayfs can be made by hand, and `apply` takes what is plain."""
    host.write(f"{PROJECT}/attack.py", ATTACK, owner="alice")
    before = host.run(["sh", "-c", "ls -la /etc/shadow; ls -A /home/alice /home/alice/src"]).stdout
    done = aside(host, "python3 attack.py && echo fine >fine")
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "done" not in done.stdout
    told = changes(host)
    assert "etc" not in told
    assert "sub/gone" not in told, "no mark of the agent's hides what lies below"
    assert "file" not in told or told["file"]["op"] == "modified"
    for name in ("pipe", "socket"):
        assert told[name]["never"]
    for name in ("link", ".ssh", ".git/hooks/pre-commit"):
        assert told[name]["asks"]
    shown = cloister(host, "diff", "last")
    assert "\x1b[31m" not in shown.stdout
    applied = cloister(host, "apply", "last", "fine", "deep/d", "link", "pipe", "closed")
    assert applied.returncode == 1
    assert host.read(f"{PROJECT}/fine") == "fine\n"
    assert host.read(f"{PROJECT}/file") == "old\n"
    assert not host.run(["find", PROJECT, "(", "-type", "p", "-o", "-type", "l", "-o", "-perm", "/6000", ")"]).stdout
    after = host.run(["sh", "-c", "ls -la /etc/shadow; ls -A /home/alice /home/alice/src"]).stdout
    assert after == before
    assert cloister(host, "discard", "last").returncode == 0


# --- what dies, and what stays -------------------------------------------------------------------

VICTIMS = {
    "hostd": "cloister.services.hostd",
    "the system's broker": "cloister.services.proxyd",
    "the user's broker": "cloister.services.broker",
    "the client": "^cloister run",
    "the agent": "^sleep 4711",
}


@pytest.mark.parametrize("victim", VICTIMS)
def test_killed_while_it_runs(host: Machine, victim: str) -> None:
    """Whoever is killed: the workspace is as it was, the changes until then can be reviewed, and the next run works."""
    process = host.popen(
        ["cloister", "run", "aside", "--", "bash", "-c", "echo new >file; exec sleep 4711"], user="alice", cwd=PROJECT,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        host.wait_for("pgrep -f '^sleep 4711'")
        run = json.loads(host.run(["cloister", "ps", "--json"], user="alice").stdout)[0]["id"]
        host.run(["pkill", "-KILL", "-f", "--", VICTIMS[victim]])
        if victim == "hostd":  # holds nothing
            host.run(["pkill", "-TERM", "-f", VICTIMS["the client"]])
        process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert aside(host, "cat file").stdout == "old\n"
    host.wait_for(f"grep -q finished {RUNS}/{run}/run.json", PATIENCE_S)
    assert host.read(f"{PROJECT}/file") == "old\n"
    assert changes(host, run)["file"]["op"] == "modified"
    assert cloister(host, "apply", run).returncode == 0
    assert host.read(f"{PROJECT}/file") == "new\n"


@pytest.mark.parametrize("victim", ["hostd", "the user's broker"])
@pytest.mark.parametrize("moment", ["asked", "recorded"])
def test_killed_while_it_starts(host: Machine, victim: str, moment: str) -> None:
    """A start that is cut off leaves no mount, unit or change; the next run works."""
    places = {"asked": f"{RUNS}/*/overlay/work", "recorded": "/var/lib/cloister/hostd/runs/*.json"}
    pattern, count = VICTIMS[victim], f"ls -d {places[moment]} 2>/dev/null | wc -l"
    wait = f"before=$({count}); echo ready; while [ $({count}) -le $before ]; do :; done; "
    wait += f"pkill -KILL -f -- '[{pattern[0]}]{pattern[1:]}'"
    killer = host.popen(["sh", "-c", wait], stdout=subprocess.PIPE, text=True)
    assert killer.stdout
    killer.stdout.readline()
    aside(host, "echo new >file", timeout=PATIENCE_S)
    assert killer.wait(PATIENCE_S) == 0
    killer.stdout.close()
    assert host.read(f"{PROJECT}/file") == "old\n"
    assert aside(host, "cat file").stdout == "old\n"


def test_changes_outlive_the_power(host: Machine) -> None:
    """After a reboot in the middle of a run its changes wait for their user, and nothing is mounted any more."""
    run = cloister(host, "run", "-d", "aside", "--", "bash", "-c", "echo new >file; exec sleep 4711").stdout.strip()
    host.wait_for(f"test -s {RUNS}/{run}/overlay/upper/file")
    host.cut()
    assert aside(host, "cat file").stdout == "old\n"
    assert changes(host, run)["file"]["op"] == "modified"
    assert cloister(host, "discard", run).returncode == 0


# --- file systems without idmapped mounts --------------------------------------------------------


@pytest.fixture
def plain(host: Machine) -> Iterator[str]:
    """A project of alice's on a ramfs, which the kernel cannot map ids for."""
    sh(host, f"mkdir -p {OTHER}; mount -t ramfs none {OTHER}; mkdir -p {OTHER}/p/sub; cd {OTHER}/p; echo old >file; "
       "echo gone >sub/gone; ln -s file link; chown -Rh alice:team .; chmod 2770 . sub; chmod 660 file; "
       "sleep 0.1")  # fmt: skip
    yield f"{OTHER}/p"
    sh(host, f"umount -l {OTHER}; rmdir {OTHER}")


def test_without_idmapped_mounts_it_is_refused_with_what_helps(host: Machine, plain: str) -> None:
    """Ids that cannot be mapped are a refusal that names the group and the overlay; nothing was started or written."""
    before = seen(host, plain)
    done = cloister(host, "run", "shell", "--", "bash", "-c", "echo new >file", cwd=plain)
    assert done.returncode == 125
    assert "workspace-ownership" in done.stderr
    assert 'ownership = "group"' in done.stderr
    assert 'workspace.mode = "overlay"' in done.stderr
    assert seen(host, plain) == before


def test_a_group_takes_its_place(host: Machine, plain: str) -> None:
    """With a `project_group` the agent works in the workspace by that group, and alice can write what it makes."""
    script = "echo new >>file; mkdir dir; echo made >dir/made"
    done = cloister(host, "run", "team", "--", "bash", "-c", script, cwd=plain)
    assert done.returncode == 0, done.stderr
    assert sh(host, "cat file; echo mine >>dir/made; rm -r dir", user="alice", cwd=plain) == "old\nnew\n"


def test_a_copy_takes_its_place(host: Machine, plain: str) -> None:
    """In overlay mode the agent works in a copy, which is said; what it changed and deleted is reviewed and applied."""
    before = seen(host, plain)
    done = aside(host, "cat link; echo new >file; rm -r sub; echo made >made", cwd=plain)
    assert (done.returncode, done.stdout) == (0, "old\n"), done.stderr
    assert seen(host, plain) == before
    assert any("copy" in notice for notice in json.loads(cloister(host, "receipt", "last", "--json").stdout)["notices"])
    assert {path: one["op"] for path, one in changes(host, cwd=plain).items()} == {
        "file": "modified", "made": "added", "sub": "deleted",
    }  # fmt: skip
    assert cloister(host, "apply", "last", cwd=plain).returncode == 0
    assert host.run(["sh", "-c", "cat file made; ls"], cwd=plain).stdout.split() == [
        "new",
        "made",
        "file",
        "link",
        "made",
    ]


def test_what_cannot_be_copied_whole_is_refused(host: Machine, plain: str) -> None:
    """A file that alice cannot read would look deleted in the review: the run is refused, and nothing of it is left."""
    sh(host, "echo x >of-root; chmod 600 of-root", cwd=plain)
    done = aside(host, "true", cwd=plain)
    assert done.returncode == 125
    assert "workspace-copy" in done.stderr
    assert "of-root" in done.stderr


# --- a repository elsewhere ----------------------------------------------------------------------


@pytest.fixture
def worktree(host: Machine) -> Callable[[str], str]:
    """Return a function that makes a repository in a directory, and a worktree of it in the project."""

    def make(place: str) -> str:
        sh(host, f"rm -rf {place}; install -d -o alice {place}")
        sh(host, f"rm -rf {PROJECT}; git init -q {place}; cd {place}; git config user.name a; "
           "git config user.email a@example.org; git commit -q --allow-empty -m first; "
           f"git worktree add -q {PROJECT}; sleep 0.1", user="alice")  # fmt: skip
        return f"{place}/.git"

    return make


def test_a_linked_worktree_has_its_git(host: Machine, worktree: Callable[[str], str]) -> None:
    """A commit inside is alice's outside; the repository's hooks and configuration are read-only, also while absent."""
    git = worktree("/home/alice/src/main")
    script = "\n".join([
        "echo x >x && git add x && git commit -q -m second && git log --oneline | wc -l",
        *(f"(echo x >{git}/{name}) 2>/dev/null && echo written {name}" for name in ("config", "hooks/x", "commondir")),
        "ls -A /home/alice/src/main",
    ])  # fmt: skip
    done = cloister(host, "run", "shell", "--", "bash", "-c", script)
    assert (done.returncode, done.stdout.split()) == (0, ["2", ".git"]), done.stderr
    assert "[workspace-changed]" not in done.stderr
    logged = host.run(["git", "log", "--format=%s"], user="alice", cwd=PROJECT).stdout
    assert logged.split() == ["second", "first"]
    assert set(host.run(["find", git, "-printf", "%u\n"]).stdout.split()) == {"alice"}


def test_in_overlay_mode_it_can_only_be_read(host: Machine, worktree: Callable[[str], str]) -> None:
    """The repository lies outside of what is kept aside, so history is there, and no commit."""
    git = worktree("/home/alice/src/main")
    done = aside(host, f"git log --format=%s; touch {git}/x 2>/dev/null || echo no; echo x >x")
    assert done.stdout.split() == ["first", "no"], done.stderr
    assert list(changes(host)) == ["x"]


@pytest.mark.parametrize("place", ["/home/alice/elsewhere", "/srv/elsewhere"])
def test_a_repository_below_no_root_is_not_shown(host: Machine, worktree: Callable[[str], str], place: str) -> None:
    """What the policy does not let alice give away stays outside, and the run says that git does not work."""
    worktree(place)
    done = cloister(host, "run", "shell", "--", "bash", "-c", f"git log; ls {place}; echo works")
    assert done.stdout == "works\n"
    notices = json.loads(cloister(host, "receipt", "last", "--json").stdout)["notices"]
    assert any("git does not work" in notice for notice in notices)
    host.run(["rm", "-rf", place])


def test_bobs_repository_is_not_alices(host: Machine, worktree: Callable[[str], str]) -> None:
    """A `.git` file that names somebody else's repository is refused before anybody is asked."""
    worktree("/home/alice/src/main")
    sh(host, "chown -R bob /home/alice/src/main/.git")
    done = cloister(host, "run", "shell", "--", "bash", "-c", "git log")
    assert done.returncode == 125
    assert "git-pointer" in done.stderr
    host.run(["rm", "-rf", "/home/alice/src/main"])


SWAP = """
import ctypes, sys
libc = ctypes.CDLL(None)
first, second = (name.encode() for name in sys.argv[1:3])
print("ready", flush=True)
while True:
    libc.renameat2(-100, first, -100, second, 2)
"""


def test_a_repository_that_is_swapped_shows_nothing_else(host: Machine, worktree: Callable[[str], str]) -> None:
    """While its name leads to bob's repository every other moment, a run has alice's, or none, or is refused."""
    worktree("/home/alice/src/main")
    sh(host, "rm -rf /srv/bobs; mkdir -p /srv/bobs; cp -r /home/alice/src/main/.git /srv/bobs/.git; "
       "echo SECRET >/srv/bobs/.git/description; chown -R bob /srv/bobs; "
       "ln -s /srv/bobs /home/alice/src/decoy")  # fmt: skip
    swapper = host.popen([PYTHON, "-c", SWAP, "/home/alice/src/main", "/home/alice/src/decoy"], stdout=subprocess.PIPE)
    assert swapper.stdout
    swapper.stdout.readline()
    told = []
    try:
        for _ in range(8):
            script = "cat /home/alice/src/main/.git/description; echo x >/home/alice/src/main/.git/objects/x; true"
            told.append(cloister(host, "run", "shell", "--", "bash", "-c", script))
    finally:
        swapper.kill()
        swapper.wait()
        swapper.stdout.close()
    assert not [one.stdout for one in told if "SECRET" in one.stdout]
    assert not host.path("/srv/bobs/.git/objects/x").exists()
    sh(host, "rm -rf /srv/bobs /home/alice/src/main /home/alice/src/decoy")
