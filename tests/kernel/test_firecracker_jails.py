"""Root's way: the chroot is built from what was verified, and the jailer makes Firecracker nobody in it.

The jailer is a look-alike that really enters the chroot, the network namespace and the other user; no guest boots.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from cloister.errors import StepError
from cloister.host import firecracker_jail
from cloister.host.firecracker import FirecrackerApi
from cloister.isolation import firecracker
from cloister.isolation.firecracker_jailer import Jailed, chroot, jailer_argv, pid_file, place, placed
from cloister.plan.vm import VmFile, VmLaunch
from cloister.runs.vm_firecracker import FirecrackerDriver
from support.firecracker_programs import install, install_jailer

pytestmark = [pytest.mark.kernel, pytest.mark.root]
UID, GID = 230001, 230002
ROLES = ("kernel", "initramfs", "root", "var", "workspace")


class Jail(NamedTuple):
    """A jail that is described, and what shall lie in it."""

    jailed: Jailed
    launch: VmLaunch
    files: Path
    cgroups: Path

    @property
    def root(self) -> Path:
        """What the jail sees as `/`."""
        return Path(chroot(self.jailed))

    def open(self) -> list[int]:
        """Open the files as the broker does."""
        return [os.open(file.path, os.O_RDWR if file.write else os.O_RDONLY) for file in self.launch.files]

    def build(self) -> None:
        """Build the chroot."""
        descriptors = self.open()
        try:
            pairs = list(zip(placed(self.launch), descriptors, strict=True))
            firecracker_jail.build(str(self.root), pairs, uid=UID, gid=GID)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


@pytest.fixture
def jail() -> Iterator[Jail]:
    """A jail below a directory of root's alone."""
    top = Path(tempfile.mkdtemp(prefix="cloister-jail-", dir="/var/tmp"))
    for name in ("bin", "base", "files", "cgroup"):
        (top / name).mkdir()
    for role in ROLES:
        path = top / "files" / role
        path.write_bytes(role.encode() * 1024)
        path.chmod(0o444 if role == "root" else 0o600)
    jailed = Jailed(
        jailer=str(install_jailer(top / "bin")), firecracker=str(install(top / "bin")), run="run-1", uid=UID, gid=GID,
        base=str(top / "base"), parent_cgroup="cloister/vm", cgroups=(("memory.max", "268435456"),), open_files=256,
    )  # fmt: skip
    launch = VmLaunch(
        image="x", version=1, manifest="", monitor="firecracker", accelerator="kvm", memory_mib=128, cpus=1,
        files=tuple(
            VmFile(role=role, path=str(top / "files" / role), write=role in {"var", "workspace"}) for role in ROLES
        ),
        fields=(), inner=(), directory=str(top), disk_bytes=1,
    )  # fmt: skip
    yield Jail(jailed, launch, top / "files", top / "cgroup")
    shutil.rmtree(top)


def test_what_lies_in_the_chroot(jail: Jail) -> None:
    """Disks are the very files; what is only read is root's, and the jail's group reads it; then all is taken away."""
    jail.build()
    states = {path.name: path.stat() for path in jail.root.iterdir()}

    assert set(states) == {"vmlinux", "initramfs.cpio", "root.img", "var.img", "workspace.img"}
    for name in ("vmlinux", "initramfs.cpio"):
        assert (states[name].st_uid, states[name].st_gid, states[name].st_mode & 0o777) == (0, GID, 0o440)
    for role in ("root", "var", "workspace"):
        assert states[f"{role}.img"].st_ino == (jail.files / role).stat().st_ino
    assert (states["root.img"].st_uid, states["root.img"].st_mode & 0o222) == (0, 0)
    assert {(states[f"{role}.img"].st_uid, states[f"{role}.img"].st_gid) for role in ("var", "workspace")} == {
        (UID, GID)
    }
    assert (jail.root / "vmlinux").read_bytes() == (jail.files / "kernel").read_bytes()

    firecracker_jail.clear(str(jail.root))
    assert not jail.root.parent.exists()
    assert (jail.files / "workspace").read_bytes() == b"workspace" * 1024
    firecracker_jail.clear(str(jail.root))


def test_what_was_verified_is_what_lies_there(jail: Jail) -> None:
    """A path that leads elsewhere by now changes nothing: files come by their descriptors."""
    descriptors = jail.open()
    for role in ROLES:
        (jail.files / role).rename(jail.files / f"{role}.old")
        (jail.files / role).write_bytes(b"forged")
    pairs = list(zip(placed(jail.launch), descriptors, strict=True))
    firecracker_jail.build(str(jail.root), pairs, uid=UID, gid=GID)

    for role, name in (("kernel", "vmlinux"), ("root", "root.img"), ("workspace", "workspace.img")):
        assert (jail.root / name).read_bytes() == role.encode() * 1024
    for descriptor in descriptors:
        os.close(descriptor)


def test_a_root_that_the_jail_could_write_is_copied(jail: Jail) -> None:
    """A root image whose mode would keep the jail out, or let it write, is copied instead of linked."""
    for mode in (0o400, 0o666):
        (jail.files / "root").chmod(mode)
        jail.build()
        found = (jail.root / "root.img").stat()
        assert found.st_ino != (jail.files / "root").stat().st_ino
        assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (0, GID, 0o440)
        firecracker_jail.clear(str(jail.root))


def test_a_chroot_that_is_there_is_not_used(jail: Jail) -> None:
    """What somebody else has put there is neither used nor taken away; half a chroot is never left."""
    jail.root.mkdir(parents=True)
    (jail.root / "trap").touch()
    with pytest.raises(StepError) as caught:
        jail.build()
    assert caught.value.reference == "firecracker-jail"
    assert [path.name for path in jail.root.iterdir()] == ["trap"]
    firecracker_jail.clear(str(jail.root))

    pairs = [(one, os.open("/dev/null", os.O_RDONLY)) for one in placed(jail.launch)]
    with pytest.raises(StepError):
        firecracker_jail.build(str(jail.root), pairs, uid=UID, gid=GID)
    assert not jail.root.exists()
    for _, descriptor in pairs:
        os.close(descriptor)


def test_clearing_follows_no_link(jail: Jail) -> None:
    """What the jail's user has made of the chroot is taken away, and nothing that a link of it leads to."""
    jail.build()
    (jail.root / "files").symlink_to(jail.files)
    (jail.root / "deep").mkdir()
    (jail.root / "deep" / "up").symlink_to("../../../../../files/kernel")
    firecracker_jail.clear(str(jail.root))

    assert (jail.files / "kernel").exists()
    assert not jail.root.parent.exists()


def test_firecracker_in_the_jail(jail: Jail) -> None:
    """It runs as another user in the chroot, in its own PID and network namespace, within its cgroup and limits.

    From there it takes every request of a start by paths of the chroot; outside of it those files do not exist for it.
    """
    with network() as holder:
        netns = f"/proc/{holder}/ns/net"
        jail.build()
        argv = [*jailer_argv(jail.jailed)]
        argv[argv.index("--new-pid-ns") : argv.index("--new-pid-ns")] = ["--netns", netns]
        environment = {**os.environ, "JAILER_ALIKE_CGROUPS": str(jail.cgroups)}
        subprocess.run(argv, check=True, timeout=60, env=environment)
        pid = int(Path(pid_file(jail.jailed)).read_text(encoding="ascii"))
        try:
            look_at(pid, jail, netns)
            asyncio.run(configured(jail))
        finally:
            os.kill(pid, signal.SIGKILL)
    assert (jail.cgroups / "cloister/vm/run-1/memory.max").read_text() == "268435456"


@contextlib.contextmanager
def network() -> Iterator[int]:
    """Give the pid of a process in a network namespace of its own."""
    holder = subprocess.Popen(["/usr/bin/unshare", "--net", "/bin/sleep", "1000"])
    try:
        here, until = Path("/proc/self/ns/net").readlink(), time.monotonic() + 20
        while Path(f"/proc/{holder.pid}/ns/net").readlink() == here and time.monotonic() < until:
            time.sleep(0.01)
        yield holder.pid
    finally:
        holder.kill()
        holder.wait()


def look_at(pid: int, jail: Jail, netns: str) -> None:
    """See that the process is what it must be."""
    until = time.monotonic() + 30
    while not (jail.root / "api.sock").exists() and time.monotonic() < until:
        time.sleep(0.01)
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    assert (status["Uid"], status["Gid"]) == ("\t".join([str(UID)] * 4), "\t".join([str(GID)] * 4))
    assert {status[name] for name in ("CapEff", "CapPrm")} == {"0" * 16}
    assert status["NSpid"].split()[-1] == "1"
    assert Path(f"/proc/{pid}/root").stat().st_ino == jail.root.stat().st_ino
    assert Path(f"/proc/{pid}/ns/net").readlink() == Path(netns).readlink()
    assert "256" in next(line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if "open files" in line)


async def configured(jail: Jail) -> None:
    """Ask for all of a start but the start, and for what is not in the jail."""
    api = FirecrackerApi(str(jail.root / "api.sock"), owner=UID)
    machine = firecracker.Machine(cmdline="quiet")
    driver = FirecrackerDriver(api, jail.launch, machine, place(jail.launch))
    version = await driver._version()
    for request in firecracker.start_requests(jail.launch, machine, place(jail.launch), version)[:-1]:
        await api.call(*request)
    outside = firecracker.start_requests(
        jail.launch,
        machine,
        firecracker.Place(directory="/", files=tuple(one.path for one in jail.launch.files)),
        version,
    )
    with pytest.raises(StepError, match="cannot be opened"):
        await api.call(*outside[1])
    with pytest.raises(StepError, match="another user"):
        await FirecrackerApi(str(jail.root / "api.sock")).call("GET", "/version")


@pytest.mark.parametrize(
    "words", [["--id", "a_b"], ["--cgroup", "x"], ["--resource-limit", "stack=1"], ["--seccomp-level", "0"]]
)
def test_the_look_alike_is_strict(jail: Jail, words: list[str]) -> None:
    """Flags that the jailer does not know or take are refused, before anything is made."""
    argv = [*jailer_argv(jail.jailed)]
    argv[argv.index("--new-pid-ns") : argv.index("--new-pid-ns")] = words
    assert subprocess.run(argv, check=False, capture_output=True).returncode == 2
    assert not jail.root.exists()
