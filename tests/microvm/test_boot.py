"""Where the agent's guest begins: what stands before a run comes, and what the agent finds there. One boot for most."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from support import guest_machine
from support.guest_link import HOME, UID, GuestLink, fields
from support.guest_machine import GuestMachine, line

PROJECT = "/work/project"
STATE = ".agent"
CARRIED = {
    "etc/resolv.conf": b"nameserver 192.0.2.1\n",
    f"{HOME[1:]}/.config/tool/settings": b"carried",
    f"{HOME[1:]}/{STATE}/seeded": b"from the tar",
    f"{HOME[1:]}/{'deep/' * 40}end": b"a long name",
    "run/cloister/box/token": b"first",
}


def make_disk(path: Path, source: Path | None = None, size: str = "32M") -> Path:
    """Make an ext4 file system in a file, filled from a directory; its top belongs to the agent."""
    filled = ["-d", str(source)] if source else []
    owner = f"root_owner={UID}:{UID}"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-E", owner, *filled, path, size], check=True, capture_output=True)
    return path


def state_of(disk: Path) -> str:
    """Return what the superblock says of how it was left."""
    shown = subprocess.run(["dumpe2fs", "-h", disk], check=True, capture_output=True, text=True).stdout
    flags = "journal to replay" if "needs_recovery" in shown else ""
    return next(each.split(":")[1].strip() for each in shown.splitlines() if "Filesystem state" in each) + flags


class Living(NamedTuple):
    """A guest in which a run has begun."""

    machine: GuestMachine
    link: GuestLink
    hello: dict[str, str]
    began: float
    disks: dict[str, Path]


@pytest.fixture(scope="module")
def booted(image, tmp_path_factory: pytest.TempPathFactory) -> guest_machine.Image:
    """What the tests' image starts from."""
    return guest_machine.of(image)


@pytest.fixture(scope="module")
def living(booted: guest_machine.Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Living]:
    """One guest with both disks; the workspace has something to hold and something to hide."""
    folder = tmp_path_factory.mktemp("disks")
    work = folder / "work"
    (work / "held").mkdir(parents=True)
    (work / "held/file").write_text("as it was")
    (work / "secrets").mkdir()
    (work / "secrets/key").write_text("canary")
    (work / "hidden").write_text("canary")
    disks = {"var": make_disk(folder / "var.img"), "workspace": make_disk(folder / "workspace.img", work)}
    with GuestMachine(booted, line(booted), disks) as machine:
        link = GuestLink(machine.channel)
        hello = link.join()
        began = time.time()
        words = fields(
            workspace=PROJECT, state=(STATE, ".deep/kept"), ro=("held", "not-there"), mask=("secrets", "hidden"),
            seed=f"{HOME}/{STATE}/seeded", tmpfs=32 << 20,
        )  # fmt: skip
        link.begin(words, CARRIED)
        yield Living(machine, link, hello, began, disks)


def test_a_guest_says_which_root_it_booted(living: Living, booted: guest_machine.Image) -> None:
    """The guest's first word names the verity root that it was told to trust, and it began by it."""
    assert living.hello["verity"] == booted.verity.split(":")[2]
    mounts = living.link.shell("cat /proc/mounts").out.splitlines()
    assert any(each.startswith("/dev/dm-0 /usr erofs ro,nosuid,nodev") for each in mounts)
    assert not any(each.split()[0] == "/dev/vda" for each in mounts)


def test_nothing_of_the_root_can_be_written(living: Living) -> None:
    """The agent can write its home, its workspace and /tmp, and nothing of the root or of the guest."""
    for path in ("/usr", "/usr/bin", "/", "/etc", "/run/cloister", "/run/cloister/box", "/var", "/opt", "/sys", "/dev"):
        assert living.link.shell(f"touch {path}/x").status != 0, path
    for path in (HOME, PROJECT, "/workspace", "/tmp", "/dev/shm", "/var/tmp", f"{HOME}/{STATE}"):
        assert living.link.shell(f"echo x >{path}/x && rm {path}/x").status == 0, path


def test_every_mount_is_without_devices_and_set_uid(living: Living) -> None:
    """No file system that the agent sees honours set-uid bits, and none but /dev and ptys has devices."""
    for each in living.link.shell("cat /proc/mounts").out.splitlines():
        _, where, kind, options = each.split()[:4]
        assert "nosuid" in options.split(","), each
        if where != "/dev" and kind not in {"devpts", "devtmpfs"}:
            assert "nodev" in options.split(","), each
    assert living.link.shell("mknod /tmp/null c 1 3").status != 0
    assert living.link.shell("ls /run/cloister/private").status != 0, "the guest's own devices"


def test_only_harmless_devices_are_there(living: Living) -> None:
    """PROMISE-723: /dev has what programs expect, and neither disk, memory, console nor channel."""
    names = set(living.link.run("ls", "/dev").out.split())
    assert names == {"fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty",
                     "urandom", "zero"}  # fmt: skip
    assert living.link.shell("head -c 4 /dev/urandom >/dev/null && echo gone >/dev/null").status == 0
    for number in ("b 254 0", "c 1 1", "c 4 64"):
        assert living.link.shell(f"mknod /tmp/node {number}").status != 0


def test_modules_cannot_be_loaded_any_more(living: Living) -> None:
    """With the first run the kernel's code is complete: no modules, no kexec, no messages to read."""
    shown = living.link.shell(
        "cd /proc/sys/kernel; cat modules_disabled kexec_load_disabled dmesg_restrict unprivileged_bpf_disabled"
    )
    assert shown.out.split() == ["1", "1", "1", "1"]
    assert living.link.run("cat", "/proc/sys/user/max_user_namespaces").out == "0\n"
    assert living.link.shell("echo 0 >/proc/sys/kernel/modules_disabled").status != 0
    assert living.link.shell("head -c 100 /dev/kmsg || dmesg").status != 0


def test_the_agent_has_no_rights_of_root(living: Living) -> None:
    """The agent has its own uid, no capability to have or to get, and can neither mount nor reboot."""
    shown = dict(each.split(":", 1) for each in living.link.run("cat", "/proc/self/status").out.splitlines())
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(shown[name], 16) == 0, name
    assert shown["NoNewPrivs"].strip() == "1"
    assert living.link.run("id").out.strip() == f"uid={UID}(alice) gid={UID}(alice) groups={UID}(alice)"
    assert living.link.shell("mount -t tmpfs none /tmp").status != 0
    script = "import os,ctypes; c=ctypes.CDLL(None,use_errno=True); r=c.reboot(0x1234567); print(r, ctypes.get_errno())"
    assert living.link.run("python3", "-c", script).out.split() == ["-1", "1"]
    assert living.link.shell("kill -9 1").status != 0
    assert living.link.run("true").status == 0


def test_processes_of_root_are_out_of_sight(living: Living) -> None:
    """The agent sees its own processes only."""
    seen = living.link.shell("cat /proc/[0-9]*/status | grep ^Uid").out.splitlines()
    assert seen
    assert {each.split()[1] for each in seen} == {str(UID)}


def test_the_run_gives_the_guest_its_names_and_time(living: Living) -> None:
    """Hostname, machine id, account and clock are those that the run brought."""
    assert living.link.shell("cat /etc/hostname; cat /proc/sys/kernel/hostname").out.split() == ["box", "box"]
    assert len(living.link.run("cat", "/etc/machine-id").out.strip()) == 32
    assert "127.0.0.1 localhost box" in living.link.run("cat", "/etc/hosts").out
    now = float(living.link.run("date", "+%s.%N").out)
    assert living.began - 1 <= now <= time.time() + 1
    assert living.link.shell("cat ~/.config/tool/settings; whoami").out == "carriedalice\n"


def test_names_time_and_randomness_are_renewed(living: Living) -> None:
    """A second beginning, as after a restore, changes what must be fresh, and nothing else of the living run."""
    before = living.link.shell("cat /etc/machine-id; cat /proc/mounts; id")
    living.link.send("B", living.link.begin_frame(fields(hostname="again", time_ns=2_000_000_000 * 10**9)))
    until = time.monotonic() + guest_machine.PATIENCE
    while living.link.run("cat", "/proc/sys/kernel/hostname").out != "again\n":
        assert time.monotonic() < until
    assert int(living.link.run("date", "+%s").out) >= 2_000_000_000
    after = living.link.shell("cat /etc/machine-id; cat /proc/mounts; id")
    assert after.out.splitlines()[0] != before.out.splitlines()[0]
    assert after.out.splitlines()[1:] == before.out.splitlines()[1:]


def test_without_an_address_there_is_loopback_only(living: Living) -> None:
    """A guest that no run gave a card has no driver for one, and reaches nothing but itself."""
    link = living.link
    assert link.run("ls", "/sys/class/net").out.split() == ["lo"]
    loaded = {each.split()[0] for each in link.run("cat", "/proc/modules").out.splitlines()}
    assert not loaded & {"virtio_net", "net_failover", "vsock", "vmw_vsock_virtio_transport"}
    assert {"dm_verity", "virtio_console"} <= loaded
    script = "import socket; print(socket.socket().connect_ex(('10.0.0.1', 80)))"
    assert link.run("python3", "-c", script).out.strip() == "101", "ENETUNREACH"


def test_files_of_the_run_lie_where_they_belong(living: Living) -> None:
    """What the tar holds belongs to the agent in its home, and cannot be changed by it anywhere else."""
    found = living.link.shell(
        f"cat /etc/resolv.conf; cat {HOME}/{'deep/' * 40}end; stat -c '%a %U' ~/.config/tool/settings /etc/resolv.conf"
        " /run/cloister/box/token; stat -c %U:%G /run/cloister/box/token"
    )
    assert found.out.splitlines() == [
        "nameserver 192.0.2.1", "a long name600 alice", "644 root", "440 root", "root:alice",
    ]  # fmt: skip
    assert living.link.shell("rm -f /run/cloister/box/token; echo x >/run/cloister/box/token").status != 0


def test_the_workspace_is_at_its_hosts_path_too(living: Living) -> None:
    """At /workspace and at its path on the host: what is held cannot be changed, what is hidden is empty."""
    link = living.link
    assert link.shell(f"echo new >{PROJECT}/new && cat /workspace/new").out == "new\n"
    for top in (PROJECT, "/workspace"):
        assert link.shell(f"cat {top}/held/file").out == "as it was"
        assert link.shell(f"echo changed >{top}/held/file || rm -rf {top}/held").status != 0
        assert link.shell(f"mv {top}/held {top}/moved").status != 0
        assert link.shell(f"cat {top}/hidden; cat {top}/secrets/key; ls {top}/secrets").out == ""


def test_the_disks_are_left_clean_and_state_is_kept(living: Living, booted: guest_machine.Image) -> None:
    """At the end both disks are clean; kept state is there again, and links in it lead nothing astray.

    What was seeded once is not overwritten.
    """
    living.link.shell(
        f"echo kept >{HOME}/.deep/kept/it; echo mine >{HOME}/{STATE}/seeded; cd {HOME}/{STATE};"
        "ln -s /etc away; ln -s /etc/passwd file; sleep 1000 >~/.deep/kept/open 2>&1 & exec true"
    )
    assert living.link.finish() == 0
    assert state_of(living.disks["var"]) == "clean"
    assert state_of(living.disks["workspace"]) == "clean"
    with GuestMachine(booted, line(booted), living.disks) as machine:
        link = GuestLink(machine.channel)
        link.join()
        files = {f"{HOME[1:]}/{STATE}/{name}": b"from the tar" for name in ("seeded", "away/below", "file")}
        elsewhere = "/opt/not/in the image"
        link.begin(fields(state=(STATE, ".deep/kept"), seed=f"{HOME}/{STATE}/seeded", workspace=elsewhere), files)
        shown = link.shell(f"cd '{elsewhere}' && cat held/file && echo x >own && cat /workspace/own")
        assert shown.out == "as it wasx\n"
        assert link.shell("touch /opt/x || touch /opt/not/x").status != 0
        assert link.shell(f"cd {HOME}; cat .deep/kept/it {STATE}/seeded").out == "kept\nmine\n"
        assert link.shell(f"cd {HOME}/{STATE}; cat away/below file; test -d away -a ! -L away -a ! -L file").status == 0
        assert link.shell("ls /etc/below").status != 0
