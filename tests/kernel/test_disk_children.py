"""Long work on disks is a child's: it says how far it is, can be ended, ends with its parent, and gives things up."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import vm_disk_rig as rig

from cloister.errors import CloisterError, RetryError, StepError, UnsupportedError
from cloister.host import child_start, disk_child, vm_fill, vm_hand_back
from cloister.host.child_start import Child, Spares
from cloister.host.disk_child import Watch
from cloister.host.kernel_features import landlock_abi
from cloister.host.vm_workspace import WorkspaceDisk
from cloister.isolation.seccomp_narrow import assemble_narrow

pytestmark = pytest.mark.kernel

MANY = 3000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A workspace with many files."""
    made = tmp_path / "work"
    for index in range(MANY):
        (made / f"{index // 100:03d}").mkdir(parents=True, exist_ok=True)
        (made / f"{index // 100:03d}/{index}").write_bytes(b"x" * 100)
    return made


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Where its disk is made."""
    (tmp_path / "vm").mkdir()
    return tmp_path / "vm/workspace.img"


def fill(root: Path, disk: Path, watch: Watch | None = None) -> WorkspaceDisk:
    """Fill it in a child."""
    return vm_fill.fill(rig.tools(), rig.layout(root), str(disk), room_bytes=rig.ROOM, uid=1000, gid=1000, watch=watch)


def children() -> set[int]:
    """Every process below this one, and those that it has left to others."""
    found = subprocess.run(["pgrep", "-f", "cloister.host.disk_work"], capture_output=True, text=True, check=False)
    return {int(word) for word in found.stdout.split()}


def ours() -> set[int]:
    """Those of this process, found faster than their work is done."""
    return {
        int(word)
        for each in Path("/proc/self/task").iterdir()
        for word in (each / "children").read_text("ascii").split()
    }


def test_a_child_fills_as_this_process_does(root: Path, disk: Path, tmp_path: Path) -> None:
    """The same disk and the same answer; how far it is was told, and never more than there is."""
    told: list[tuple[int, int]] = []
    (root / os.fsdecode(b"odd\xff\n name")).write_text("odd")
    made = fill(root, disk, Watch(lambda done, total: told.append((done, total))))
    here = rig.fill(root, tmp_path / "here.img")
    assert made == WorkspaceDisk(str(disk), here.size_bytes, here.entries, here.fields, here.notices)
    assert rig.seen(disk) == rig.seen(tmp_path / "here.img") == rig.on_host(root)
    assert told
    assert all(0 <= done <= total for done, total in told)


def test_an_error_in_the_child_is_the_same_error(disk: Path, tmp_path: Path) -> None:
    """Class, reference and words are those that the work has; a workspace that is gone is one to try again."""
    with pytest.raises(RetryError) as gone:
        fill(tmp_path / "nothing", disk)
    assert gone.value.reference == "workspace-changing"
    assert str(tmp_path / "nothing") in gone.value.where
    assert list(disk.parent.iterdir()) == []


def test_work_that_nobody_wants_any_more_ends_and_leaves_nothing(root: Path, disk: Path) -> None:
    """Ended while it fills: within a moment, no process, no disk and no half of one."""
    for delay in (0.0, 0.15, 0.3):
        watch = Watch()
        timer = threading.Timer(delay, watch.cancel)
        timer.start()
        began = time.monotonic()
        with contextlib.suppress(RetryError):
            fill(root, disk, watch)
            vm_hand_back.drop(str(disk))  # it was faster
        timer.cancel()
        assert time.monotonic() - began < delay + 5
        assert list(disk.parent.iterdir()) == []


def test_a_killed_child_is_an_error_and_leaves_nothing(root: Path, disk: Path, tmp_path: Path) -> None:
    """Killed at any point, the parent says so, and nothing of its work is there; a hand-back can be done again."""

    def kill(_done: int, _total: int) -> None:
        for pid in ours():
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(StepError) as killed:
        fill(root, disk, Watch(kill))
    assert killed.value.reference == "vm-disk-child"
    assert list(disk.parent.iterdir()) == []
    fill(root, disk)
    upper = tmp_path / "overlay/upper"
    with pytest.raises(StepError):
        vm_hand_back.hand_back(rig.tools(), str(disk), str(upper), root=str(root), watch=Watch(kill))
    assert not upper.parent.exists()
    assert vm_hand_back.hand_back(rig.tools(), str(disk), str(upper), root=str(root)).changes == 0


def test_it_ends_with_its_parent(root: Path, disk: Path) -> None:
    """A parent that is killed while it waits leaves no process, and no disk under its name."""
    program = (
        "import sys; from pathlib import Path; sys.path[:0] = sys.argv[3:]\n"
        "import test_disk_children as t; print('go', flush=True); t.fill(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    before = children()
    parent = subprocess.Popen(
        [sys.executable, "-c", program, root, disk, *filter(None, sys.path)], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    parent.stdout.readline()
    until = time.monotonic() + 10
    while not children() - before and time.monotonic() < until:
        time.sleep(0.005)
    ours = children() - before
    parent.kill()
    parent.wait()
    until = time.monotonic() + 5
    while ours & children() and time.monotonic() < until:
        time.sleep(0.01)
    assert ours
    assert not ours & children()
    assert not disk.exists()
    vm_hand_back.tidy(str(disk))  # what the next broker does
    assert list(disk.parent.iterdir()) == []


def waited_for(spares: Spares) -> int:
    """Have a spare made; return its process."""
    before = ours()
    until = time.monotonic() + 10
    while not (made := ours() - before) and time.monotonic() < until:
        spares.want()
        time.sleep(0.005)
    return made.pop()


def test_a_spare_does_what_a_fresh_child_does(root: Path, disk: Path, tmp_path: Path) -> None:
    """Each works once, and another takes its place; one that was killed meanwhile is missed by nobody."""
    spares = Spares(("cloister.host.disk_work",))
    first = waited_for(spares)
    watch = Watch(spares=spares)
    made = fill(root, disk, watch)
    assert first not in ours()
    assert made.entries == rig.fill(root, tmp_path / "here.img").entries
    until = time.monotonic() + 10
    while not (second := ours()) and time.monotonic() < until:
        time.sleep(0.005)
    killed = second.pop()
    os.kill(killed, signal.SIGKILL)
    while Path(f"/proc/{killed}/stat").read_text("ascii").split()[2] != "Z" and time.monotonic() < until:
        time.sleep(0.005)
    back = vm_hand_back.hand_back(rig.tools(), str(disk), str(tmp_path / "overlay/upper"), root=str(root), watch=watch)
    assert back.changes == 0
    while not (third := spares.take()) and time.monotonic() < until:
        time.sleep(0.005)
    assert third
    third.end()


def test_a_spare_knows_nothing_before_its_request(tmp_path: Path) -> None:
    """No descriptor of ours but its socket and its output, no variable, no file open; and it leaves without work."""
    secret = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(secret, True)  # its own signature
    child = Child(("cloister.host.disk_work",))
    try:
        place = Path(f"/proc/{child.process.pid}")
        until = time.monotonic() + 10
        while "recv" not in (place / "wchan").read_text() and time.monotonic() < until:
            time.sleep(0.01)
        held = {os.readlink(one).partition(":")[0] for one in (place / "fd").iterdir()}
        assert held == {"socket", "pipe", "/dev/null"}
        names = {word.partition("=")[0] for word in (place / "environ").read_text().split("\0") if word}
        assert names <= {"PATH", "LANG", "LC_ALL", "LC_CTYPE"}
    finally:
        os.close(secret)
        child.end()
    gone = Child(())
    gone._ours.close()
    assert gone.process.wait(10) == 0
    assert gone.process.communicate()[0] == b""


def test_spares_end_when_nobody_takes_them() -> None:
    """After its time a spare goes, and comes again when work is near."""
    spares = Spares((), idle_s=1.0)
    first = waited_for(spares)
    until = time.monotonic() + 10
    while first in ours() and time.monotonic() < until:
        time.sleep(0.02)
    assert first not in ours()
    assert spares.take() is None
    until = time.monotonic() + 10
    while not ours() - {first} and time.monotonic() < until:  # made by the asking
        time.sleep(0.005)
    assert ours() - {first}


def test_a_child_that_is_silent_or_says_nonsense_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A taken-over reader can make its own work fail, and nothing else: no hang, no memory, no other exception."""
    ways = {
        "import time; time.sleep(60)": "silent",
        "print('x' * (3 << 20), end='', flush=True); import time; time.sleep(60)": "without an end",
        "print('[1]', flush=True)": "should not",
        'print(\'{"answer": {"changes": "many"}}\', flush=True)': "should not",
        'print(\'{"error": {"kind": 1}}\', flush=True)': "should not",
        'print(\'{"done": null, "total": 1}\', flush=True)': "should not",
        "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)": "by signal 11",
        "pass": "with 0",
    }
    for program, words in ways.items():
        monkeypatch.setattr(child_start, "_PROGRAM", program)
        with pytest.raises(StepError, match=words):
            disk_child.in_child("any", {}, vm_hand_back.HandBack, descriptors={}, silence_s=1.0)


# Runs confined: what a takeover of the reader would try. Prints what was not refused.
ATTACK = """
import base64, ctypes, errno, json, mmap, os, signal, socket, subprocess, sys
from cloister.host.confine_self import FILLS, confine_self
target, parent, narrow = int(sys.argv[1]), int(sys.argv[2]), base64.b64decode(sys.argv[3])
os.mkdir("old", dir_fd=target)
with open(os.open("old/mine", os.O_CREAT | os.O_WRONLY, dir_fd=target), "w") as file:
    file.write("secret")
left = []
def refused(name, call, *arguments):
    try:
        call(*arguments)
    except (OSError, ValueError, MemoryError, subprocess.SubprocessError):
        return
    left.append(name)
def listing(path):
    os.listdir(path)
def code():
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
libc = ctypes.CDLL(None, use_errno=True)
def call(*words):
    ctypes.set_errno(0)
    if libc.syscall(*[ctypes.c_ulong(word) for word in words]) == -1:
        raise OSError(ctypes.get_errno(), "refused")
confine_self(narrow, {target: FILLS}, file_bytes=1 << 20)
for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, 40):
    refused(f"socket {family}", socket.socket, family, socket.SOCK_STREAM)
refused("socketpair", socket.socketpair)
refused("fork", os.fork)
refused("exec", os.execv, "/bin/true", ["true"])
refused("spawn", subprocess.run, ["/bin/true"])
refused("kill", os.kill, parent, 0)
refused("executable memory", code)
refused("ioctl", lambda: __import__("fcntl").ioctl(0, 0x5401, b"0" * 64))
for name, number in CALLS.items():
    refused(name, call, number, 0, 0, 0, 0, 0)
refused("a limit raised", lambda: __import__("resource").setrlimit(__import__("resource").RLIMIT_AS, (-1, -1)))
refused("memory", bytes, 5 << 30)
if LANDLOCK:
    for path in ("/etc/passwd", "/proc/self/mem", "/proc/self/environ", "/dev/null", "/etc", os.__file__):
        refused(path, os.open, path, os.O_RDONLY)
    for path in ("/tmp/cloister-attack", "/dev/shm/cloister-attack", os.path.expanduser("~/cloister-attack")):
        refused(path, os.open, path, os.O_WRONLY | os.O_CREAT)
    refused("listing", listing, "/")
    refused("reading back", lambda: os.open("old/mine", os.O_RDONLY, dir_fd=target))
    refused("a way up", lambda: os.open("../outside", os.O_WRONLY | os.O_CREAT, dir_fd=target))
    refused("a link in", lambda: os.link("/etc/passwd", "in", dst_dir_fd=target))
    refused("a rename", lambda: os.rename("old", "new", src_dir_fd=target, dst_dir_fd=target))
# What it must do.
os.mkdir("made", 0o700, dir_fd=target)
with open(os.open("made/file", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=target), "wb") as file:
    file.write(b"written")
    os.ftruncate(file.fileno(), 100)
    os.fchmod(file.fileno(), 0o644)
    os.utime(file.fileno(), ns=(1, 1))
refused("a file too large", lambda: open(os.open("made/file", os.O_WRONLY, dir_fd=target), "wb").truncate(2 << 20))
os.link("made/file", "again", src_dir_fd=target, dst_dir_fd=target, follow_symlinks=False)
os.symlink("anywhere", "link", dir_fd=target)
os.mknod("gone", 0o20000, 0, dir_fd=target)
os.unlink("gone", dir_fd=target)
os.write(1, json.dumps(left).encode())
os._exit(0)
"""
CALLS = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "unshare": (272, 97), "mount": (165, 40), "bpf": (321, 280),
    "io_uring_setup": (425, 425), "keyctl": (250, 219), "userfaultfd": (323, 282), "perf_event_open": (298, 241),
    "memfd_create": (319, 279), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "shmget": (29, 194),
    "prctl": (157, 167), "seccomp": (317, 277), "setns": (308, 268), "open_tree": (428, 428), "clone3": (435, 435),
    "prlimit64": (302, 261), "setuid": (105, 146), "chroot": (161, 51), "renameat2": (316, 276),
}  # fmt: skip


def confined(place: Path, narrow: bytes) -> list[str]:
    """Run the attack; return what was not refused."""
    place.mkdir()
    target = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    column = 0 if platform.machine() == "x86_64" else 1
    script = ATTACK.replace("CALLS", repr({name: both[column] for name, both in CALLS.items()}))
    script = script.replace("LANDLOCK", str(landlock_abi() >= 2))
    words = [str(target), str(os.getpid()), base64.b64encode(narrow).decode()]
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, *words], pass_fds=(target,), capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
    finally:
        os.close(target)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return found


def test_a_takeover_of_the_reader_is_worth_nothing(tmp_path: Path) -> None:
    """No socket, process, signal, code, device, limit or path of the host; and what it must write, it writes."""
    assert confined(tmp_path / "place", assemble_narrow(platform.machine(), "disk-reader")) == []
    place = tmp_path / "place"
    assert (place / "made/file").read_bytes() == b"written".ljust(100, b"\0")
    assert (place / "again").samefile(place / "made/file")
    assert os.readlink(place / "link") == "anywhere"
    assert not (tmp_path / "outside").exists()


def test_without_a_filter_nothing_is_read(tmp_path: Path, root: Path, disk: Path) -> None:
    """No filter, or half of one: the reader refuses before it looks at the guest's bytes, and nothing is written."""
    fill(root, disk)
    for narrow in (b"", b"1234"):
        tools = rig.tools_with(reader=narrow)
        with pytest.raises(UnsupportedError) as refused:
            vm_hand_back.hand_back(tools, str(disk), str(tmp_path / "overlay/upper"), root=str(root))
        assert refused.value.reference == "vm-disk-jail"
    assert not (tmp_path / "overlay").exists()


def test_a_nonsense_filter_is_an_error(tmp_path: Path, root: Path, disk: Path) -> None:
    """What the kernel does not take as a filter stops the reader."""
    fill(root, disk)
    with pytest.raises(CloisterError):
        vm_hand_back.hand_back(
            rig.tools_with(reader=b"\xff" * 16), str(disk), str(tmp_path / "overlay/upper"), root=str(root)
        )
