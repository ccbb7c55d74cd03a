"""What Firecracker is asked for: which machine, in which order, and what it is never asked."""

import json

import hypothesis
import hypothesis.strategies as st
import pytest

from cloister.errors import UnsupportedError
from cloister.isolation import firecracker
from cloister.isolation.firecracker_api import Version, parse_version
from cloister.plan.vm import VmFile, VmLaunch

FILES = (
    VmFile(role="kernel", path="/i/vmlinux"),
    VmFile(role="initramfs", path="/i/initramfs.cpio"),
    VmFile(role="root", path="/i/root.img"),
    VmFile(role="var", path="/s/var.img", write=True),
    VmFile(role="workspace", path="/s/workspace.img", write=True),
)
PLACE = firecracker.Place(directory="/run/cloister/vm")
MACHINE = firecracker.Machine(cmdline="console=ttyS0 quiet reboot=t panic=-1 cloister.verity=1:2:3:4")
NEW: Version = (1, 16, 1)


def launch(**changed: object) -> VmLaunch:
    """Return the machine of a plan."""
    fields: dict[str, object] = {
        "image": "dev", "version": 1, "manifest": "0" * 64, "monitor": "firecracker", "accelerator": "kvm",
        "memory_mib": 512, "cpus": 2, "files": FILES, "fields": (), "inner": (),
        "directory": "/run/user/1/r/vm", "disk_bytes": 1,
    }  # fmt: skip
    return VmLaunch(**{**fields, **changed})  # type: ignore[arg-type]


def asked(machine: firecracker.Machine = MACHINE, version: Version = NEW, **changed: object) -> list[tuple[str, dict]]:
    """Return what is put where, in its order."""
    requests = firecracker.start_requests(launch(**changed), machine, PLACE, version)
    assert {request.method for request in requests} == {"PUT"}
    return [(request.path, json.loads(request.body)) for request in requests]


def test_the_machine_of_a_plan() -> None:
    """A machine is made whole and then started, last of all; disks come in the order vda, vdb, vdc."""
    assert asked() == [
        ("/machine-config", {"vcpu_count": 2, "mem_size_mib": 512}),
        (
            "/boot-source",
            {
                "kernel_image_path": "/proc/self/fd/5",
                "initrd_path": "/proc/self/fd/6",
                "boot_args": MACHINE.cmdline,
            },
        ),
        (
            "/drives/root",
            {"drive_id": "root", "path_on_host": "/proc/self/fd/7", "is_root_device": False, "is_read_only": True},
        ),
        (
            "/drives/var",
            {
                "drive_id": "var",
                "path_on_host": "/proc/self/fd/8",
                "is_root_device": False,
                "is_read_only": False,
                "cache_type": "Writeback",
            },
        ),
        (
            "/drives/workspace",
            {
                "drive_id": "workspace",
                "path_on_host": "/proc/self/fd/9",
                "is_root_device": False,
                "is_read_only": False,
                "cache_type": "Writeback",
            },
        ),
        ("/vsock", {"guest_cid": 3, "uds_path": "/run/cloister/vm/vsock.sock"}),
        ("/entropy", {}),
        ("/balloon", {"amount_mib": 0, "deflate_on_oom": True, "free_page_reporting": True}),
        ("/actions", {"action_type": "InstanceStart"}),
    ]


def test_only_the_disks_of_the_plan() -> None:
    """A machine without a workspace disk gets none; names follow the plan's order of files, not the disks'."""
    paths = [path for path, _ in asked(files=FILES[:3])]
    swapped = dict(asked(files=(FILES[2], FILES[0], FILES[1])))

    assert "/drives/root" in paths
    assert not {"/drives/var", "/drives/workspace"} & set(paths)
    assert swapped["/drives/root"]["path_on_host"] == "/proc/self/fd/5"
    assert swapped["/boot-source"]["kernel_image_path"] == "/proc/self/fd/6"


def test_limits_of_disks_and_network() -> None:
    """Bytes and operations of a second become token buckets that fill again within a second; 0 sets none."""
    rate = firecracker.Rate(bytes_per_s=1_000_000, operations_per_s=500)
    tap = firecracker.Tap(name="tap0", mac="02:00:00:00:00:01")
    machine = firecracker.Machine(cmdline="x", disks=rate, network=firecracker.Rate(bytes_per_s=7), tap=tap)
    requests = dict(asked(machine))

    assert requests["/drives/var"]["rate_limiter"] == {
        "bandwidth": {"size": 1_000_000, "refill_time": 1000},
        "ops": {"size": 500, "refill_time": 1000},
    }
    assert requests["/network-interfaces/eth0"] == {
        "iface_id": "eth0",
        "host_dev_name": "tap0",
        "guest_mac": "02:00:00:00:00:01",
        "rx_rate_limiter": {"bandwidth": {"size": 7, "refill_time": 1000}},
        "tx_rate_limiter": {"bandwidth": {"size": 7, "refill_time": 1000}},
    }
    assert "rate_limiter" not in dict(asked())["/drives/var"]


def test_older_ones_are_not_asked_for_what_they_do_not_know() -> None:
    """A field that a version does not know would make it refuse the whole request, so it is not sent."""
    assert "free_page_reporting" not in dict(asked(version=(1, 13, 1)))["/balloon"]
    assert dict(asked(version=(1, 14, 0)))["/balloon"]["free_page_reporting"] is True


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"accelerator": "tcg"}, "KVM"),
        ({"cpus": 33}, "processors"),
        ({"cpus": 0}, "processors"),
        ({"files": FILES[1:]}, "kernel"),
        ({"files": (*FILES, FILES[0])}, "each once"),
        ({"files": (VmFile(role="root", path="/i/root.img", write=True), *FILES[:2])}, "writable"),
    ],
)
def test_machines_that_it_cannot_have_are_refused(changed: dict[str, object], why: str) -> None:
    """What Firecracker cannot run, or must not, is refused before anything is asked of it, with the other monitor."""
    with pytest.raises(UnsupportedError, match=why) as caught:
        asked(**changed)
    assert caught.value.reference == "firecracker-refused"
    assert "qemu" in caught.value.remedy


@pytest.mark.parametrize("cmdline", ["", "quiet\ninit=/bin/sh", "quiet\x00", "caf\xe9"])
def test_a_command_line_is_printable_ascii(cmdline: str) -> None:
    """The kernel's command line holds nothing that one program reads otherwise than the next."""
    with pytest.raises(UnsupportedError, match="command line"):
        asked(firecracker.Machine(cmdline=cmdline))


def test_its_argv() -> None:
    """It starts with a name and a socket only: seccomp stays as it is by default, nothing is configured by a file."""
    argv = firecracker.monitor_argv("/usr/bin/firecracker", PLACE, "20261121-claude-1")

    assert argv == (
        "/usr/bin/firecracker", "--id", "20261121-claude-1", "--api-sock", "/run/cloister/vm/api.sock",
    )  # fmt: skip


@pytest.mark.parametrize("run", ["", "a" * 65, "a_b", "a/b", "a b", "ä", "--no-seccomp x"])
def test_names_that_it_would_refuse(run: str) -> None:
    """A name that Firecracker would not take is refused by us, before it is an argument."""
    with pytest.raises(UnsupportedError):
        firecracker.monitor_argv("firecracker", PLACE, run)


@pytest.mark.parametrize(
    ("text", "version"),
    [("1.16.1", (1, 16, 1)), ("Firecracker v1.8.0", (1, 8, 0)), ("1.17.0-dev", (1, 17, 0)), ("1.14.1\n", (1, 14, 1))],
)
def test_versions(text: str, version: Version) -> None:
    """A version is read from both places where Firecracker says it."""
    assert parse_version(text) == version


@pytest.mark.parametrize("text", ["", "1.7.9", "0.25.0", "latest", "1.16", "1.16.1 \x1b[2J", "v" * 200])
def test_versions_that_will_not_do(text: str) -> None:
    """One that says no version, or is older than ACPI in Firecracker, is refused as unavailable."""
    with pytest.raises(UnsupportedError) as caught:
        parse_version(text)
    assert caught.value.reference == "firecracker-unavailable"


@hypothesis.given(st.text(max_size=80))
def test_no_version_breaks_it(text: str) -> None:
    """Whatever a program calls its version: it is one, or there is a clear error."""
    try:
        assert len(parse_version(text)) == 3
    except UnsupportedError as error:
        assert error.reference == "firecracker-unavailable"  # noqa: PT017


def loaded(version: Version, tap: firecracker.Tap | None = None) -> dict:
    """Return the body that restores a machine."""
    request = firecracker.load_snapshot("/s/state", "/s/memory", PLACE, version, resume=True, tap=tap)
    assert (request.method, request.path) == ("PUT", "/snapshot/load")
    return json.loads(request.body)


def test_restores_by_version() -> None:
    """Newer ones get another socket and let the clock go on; older ones are asked only for what they know."""
    plain = {
        "snapshot_path": "/s/state",
        "mem_backend": {"backend_type": "File", "backend_path": "/s/memory"},
        "resume_vm": True,
    }
    tap = firecracker.Tap(name="tap7", mac="02:00:00:00:00:07")

    assert loaded((1, 15, 1)) == plain
    assert loaded((1, 12, 0), tap)["network_overrides"] == [{"iface_id": "eth0", "host_dev_name": "tap7"}]
    assert loaded((1, 16, 1)) == {
        **plain,
        "vsock_override": {"uds_path": "/run/cloister/vm/vsock.sock"},
        "clock_realtime": True,
    }


def test_restores_that_cannot_work_are_refused() -> None:
    """1.16.0 restores guests that stay silent for ever, and 1.11 cannot put them on another tap: both say so."""
    with pytest.raises(UnsupportedError, match=r"1\.16\.0"):
        loaded((1, 16, 0))
    with pytest.raises(UnsupportedError, match="tap"):
        loaded((1, 11, 0), firecracker.Tap(name="t", mac="02:00:00:00:00:07"))
    assert loaded((1, 11, 0))["resume_vm"]


def test_a_living_machine_is_written_into_what_it_was_given() -> None:
    """By the numbers of its own plan, wherever they stand there; a version that restores nobody is not asked."""
    out = (VmFile(role="memory-out", path="", write=True), VmFile(role="state-out", path="", write=True))
    template = (VmFile(role="memory", path="/t/memory"), VmFile(role="state", path="/t/state"))
    for files, first in (((*FILES, *out), 10), ((*FILES, *template, *out), 12)):
        request = firecracker.keep_request(launch(files=files), PLACE, NEW)
        assert (request.method, request.path) == ("PUT", "/snapshot/create")
        assert json.loads(request.body) == {
            "snapshot_path": f"/proc/self/fd/{first + 1}", "mem_file_path": f"/proc/self/fd/{first}",
            "snapshot_type": "Full",
        }  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"1\.16\.0"):
        firecracker.keep_request(launch(files=(*FILES, *out)), PLACE, (1, 16, 0))


def test_pause_balloon_and_end() -> None:
    """The few things that a living machine is asked for."""
    pause, grow, end = firecracker.set_state("Paused"), firecracker.set_balloon(64), firecracker.ask_to_end()
    snapshot = firecracker.create_snapshot("/s/state", "/s/memory")

    assert pause == ("PATCH", "/vm", b'{"state":"Paused"}')
    assert firecracker.set_state("Running").body == b'{"state":"Resumed"}'
    assert grow == ("PATCH", "/balloon", b'{"amount_mib":64}')
    assert end == ("PUT", "/actions", b'{"action_type":"SendCtrlAltDel"}')
    assert json.loads(snapshot.body) == {
        "snapshot_path": "/s/state",
        "mem_file_path": "/s/memory",
        "snapshot_type": "Full",
    }
