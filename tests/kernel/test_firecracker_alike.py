"""The look-alike of Firecracker is as strict as the real one, and the driver's requests satisfy it. No guest boots."""

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.errors import StepError, UnsupportedError
from cloister.host.firecracker import FirecrackerApi
from cloister.isolation import firecracker
from cloister.isolation.firecracker_api import Version, parse_version
from cloister.plan.vm import VmFile, VmLaunch
from cloister.runs.vm_firecracker import FirecrackerDriver
from support.firecracker_alike import models
from support.firecracker_programs import install
from support.firecracker_rig import Rig

pytestmark = pytest.mark.kernel
SWAGGER = os.environ.get("CLOISTER_FIRECRACKER_SWAGGER", "")
VERSIONS = ("1.8.0", "1.12.0", "1.14.0", "1.16.1", "1.17.0")
AFTER, BEFORE = "not supported after starting", "not supported before starting"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The look-alike, as a program."""
    return install(tmp_path_factory.mktemp("firecracker"))


@pytest.fixture
def files(tmp_path: Path) -> list[tuple[Path, bool]]:
    """Kernel, initramfs, root, var and workspace, none of which boots."""
    names = [tmp_path / name for name in ("vmlinux", "initramfs.cpio", "root.img", "var.img", "workspace.img")]
    for path in names:
        path.write_bytes(bytes(4096))
    return [(path, path.stem in {"var", "workspace"}) for path in names]


@pytest.fixture
def rig(program: Path, tmp_path: Path, files: list[tuple[Path, bool]]) -> Iterator[Rig]:
    """The look-alike, listening."""
    rig = Rig(program, tmp_path, files=files)
    rig.wait_until_it_listens()
    yield rig
    rig.close()


def driver(rig: Rig, files: list[tuple[Path, bool]], **machine: object) -> FirecrackerDriver:
    """Return the product's driver of this process."""
    roles = ("kernel", "initramfs", "root", "var", "workspace")
    launch = VmLaunch(
        image="dev", version=1, manifest="", monitor="firecracker", accelerator="kvm", memory_mib=128, cpus=1,
        files=tuple(VmFile(role=role, path="", write=write) for role, (_, write) in zip(roles, files, strict=True)),
        fields=(), inner=(), directory=str(rig.directory), disk_bytes=1,
    )  # fmt: skip
    rate = firecracker.Rate(bytes_per_s=1 << 20, operations_per_s=1000)
    made = firecracker.Machine(cmdline="console=ttyS0 quiet", disks=rate, **machine)  # type: ignore[arg-type]
    return FirecrackerDriver(
        FirecrackerApi(str(rig.socket)), launch, made, firecracker.Place(directory=str(rig.directory))
    )


DRIVE = {"drive_id": "root", "is_root_device": False, "is_read_only": True, "path_on_host": "/proc/self/fd/7"}
REFUSED = [
    ("PUT", "/nope", {}, "Invalid request method and/or path"),
    ("PATCH", "/boot-source", {}, "Invalid request method and/or path"),
    ("DELETE", "/vsock", {}, "Invalid request method and/or path"),
    ("PUT", "/machine-config", "{", "deserializing"),
    ("PUT", "/machine-config", [], "deserializing"),
    ("PUT", "/machine-config", {"vcpu_count": 1}, "missing field `mem_size_mib`"),
    ("PUT", "/machine-config", {"vcpu_count": 33, "mem_size_mib": 128}, "invalid value"),
    ("PUT", "/machine-config", {"vcpu_count": 0, "mem_size_mib": 128}, "invalid value"),
    ("PUT", "/machine-config", {"vcpu_count": True, "mem_size_mib": 128}, "invalid type"),
    ("PUT", "/machine-config", {"vcpu_count": "1", "mem_size_mib": 128}, "invalid type"),
    ("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 128, "ht_enabled": False}, "unknown field"),
    ("PUT", "/boot-source", {"kernel_image_path": "/proc/self/fd/5", "initrd": "x"}, "unknown field"),
    ("PUT", "/boot-source", {"kernel_image_path": "/nowhere"}, "cannot be opened"),
    ("PUT", "/boot-source", {"kernel_image_path": "/proc/self/fd/5", "initrd_path": "/nowhere"}, "cannot be opened"),
    ("PUT", "/drives/other", DRIVE, "does not match"),
    ("PUT", "/drives/a-b", {**DRIVE, "drive_id": "a-b"}, "alphanumeric"),
    ("PUT", "/drives/root", {**DRIVE, "path_on_host": "/nowhere"}, "Unable to create"),
    ("PUT", "/drives/root", {**DRIVE, "cache_type": "None"}, "unknown variant"),
    ("PUT", "/drives/root", {**DRIVE, "rate_limiter": {"bandwidth": {"size": 1}}}, "missing field `refill_time`"),
    ("PUT", "/vsock", {"guest_cid": 2, "uds_path": "v"}, "invalid value"),
    ("PUT", "/vsock", {"guest_cid": 3}, "missing field `uds_path`"),
    ("PUT", "/balloon", {"amount_mib": 129, "deflate_on_oom": True}, "cannot exceed"),
    ("PUT", "/actions", {"action_type": "InstanceStart"}, "without kernel configuration"),
    ("PUT", "/actions", {"action_type": "Reboot"}, "unknown variant"),
    ("PUT", "/actions", {"action_type": "SendCtrlAltDel"}, BEFORE),
    ("PATCH", "/vm", {"state": "Paused"}, BEFORE),
    ("PATCH", "/balloon", {"amount_mib": 1}, BEFORE),
    ("PUT", "/snapshot/create", {"snapshot_path": "s", "mem_file_path": "m"}, BEFORE),
    ("PUT", "/snapshot/load", {"snapshot_path": "s"}, "is required"),
    ("PUT", "/entropy", {"source": "/dev/random"}, "unknown field"),
]


@pytest.mark.parametrize(("method", "path", "body", "words"), REFUSED)
def test_it_refuses_what_firecracker_refuses(rig: Rig, method: str, path: str, body: object, words: str) -> None:
    """A request that Firecracker would refuse is refused with its reason, and changes nothing."""
    status, fault = rig.ask(method, path, body)

    assert status == 400
    assert words in fault
    assert rig.ask("GET", "/") == (200, "")


@pytest.mark.parametrize("version", VERSIONS)
def test_every_request_of_a_start_is_taken(
    program: Path, tmp_path: Path, files: list[tuple[Path, bool]], version: str
) -> None:
    """All that the driver asks for before a start is known to that version, and well formed; P-821."""
    rig = Rig(program, tmp_path, version=version, files=files)
    try:
        one = driver(rig, files, tap=firecracker.Tap(name="tap0", mac="02:00:00:00:00:02"), snapshots=True)
        asyncio.run(configure_only(one, parse_version(version)))
        assert rig.ask("PUT", "/vsock", {"guest_cid": 3, "uds_path": str(rig.channel)})[1].endswith("use")
    finally:
        rig.close()


async def configure_only(one: FirecrackerDriver, version: Version) -> None:
    """Do all that `configure` does but the start."""
    await one._api.appear()
    assert parse_version(await one._api.version()) == version
    for request in firecracker.start_requests(one._launch, one._machine, one._place, version)[:-1]:
        answer = await one._api.call(*request)
        assert answer.status == 204


@pytest.mark.parametrize(
    ("version", "request_", "field"),
    [
        ("1.13.0", ("/balloon", {"amount_mib": 0, "deflate_on_oom": True, "free_page_reporting": True}), "free_page"),
        ("1.11.0", ("/snapshot/load", {"snapshot_path": "s", "network_overrides": []}), "network_overrides"),
        ("1.15.1", ("/snapshot/load", {"snapshot_path": "s", "vsock_override": {"uds_path": "v"}}), "vsock_override"),
        ("1.15.1", ("/snapshot/load", {"snapshot_path": "s", "clock_realtime": True}), "clock_realtime"),
    ],
)
def test_older_ones_refuse_newer_fields(
    program: Path, tmp_path: Path, version: str, request_: tuple[str, object], field: str
) -> None:
    """A version does not know what came later: so a driver without gates would be found out."""
    rig = Rig(program, tmp_path, version=version)
    try:
        rig.wait_until_it_listens()
        status, fault = rig.ask("PUT", *request_)
        assert status == 400
        assert f"unknown field `{field}" in fault
    finally:
        rig.close()


def test_refusals_reach_the_person(rig: Rig, files: list[tuple[Path, bool]]) -> None:
    """A start that Firecracker refuses ends with its own reason, and what was asked."""
    rig.wait_until_it_listens()
    rig.channel.touch()
    with pytest.raises(StepError, match=r"refused PUT /vsock: Cannot create backend .*in use") as caught:
        asyncio.run(driver(rig, files).configure())
    assert caught.value.reference == "firecracker-refused"


def test_one_that_is_too_old_is_not_asked_for_anything(
    program: Path, tmp_path: Path, files: list[tuple[Path, bool]]
) -> None:
    """Older than 1.8 there is no ACPI: nothing is configured, and the other monitor is named."""
    rig = Rig(program, tmp_path, version="1.7.0", files=files)
    try:
        with pytest.raises(UnsupportedError) as caught:
            asyncio.run(driver(rig, files).configure())
        assert caught.value.reference == "firecracker-unavailable"
        assert rig.ask("PUT", "/snapshot/load", {"snapshot_path": "/nowhere", "mem_file_path": "m"})[1].startswith(
            "Load"
        )
    finally:
        rig.close()


def test_its_command_line(program: Path, tmp_path: Path) -> None:
    """Its command line is as strict: no unknown words, no strange names, and no second process at one socket."""
    first, second = Rig(program, tmp_path), None
    try:
        first.wait_until_it_listens()
        second = Rig(program, tmp_path)
        assert second.process.wait(30) == 1
    finally:
        first.close()
    for words, status in ((["--nope"], 153), (["--id", "a_b", "--api-sock", str(tmp_path / "x")], 1)):
        assert subprocess.run([program, *words], check=False, capture_output=True).returncode == status


@pytest.mark.skipif(not SWAGGER, reason="CLOISTER_FIRECRACKER_SWAGGER names no firecracker.yaml")
def test_the_published_description_agrees() -> None:
    """Where Firecracker's own description is at hand, it and the look-alike know the same fields of the same calls."""
    import yaml

    spec = yaml.safe_load(Path(SWAGGER).read_text(encoding="utf-8"))
    for name, fields in models.MODELS.items():
        described = spec["definitions"][name]
        assert set(fields) == set(described["properties"]), name
        assert {field for field, rule in fields.items() if rule.required} == set(described.get("required", ())), name
    calls = {(method.upper(), path) for path, methods in spec["paths"].items() for method in methods}
    for method, path in models.ROUTES:
        assert any(method == verb and path.split("{")[0] == known.split("{")[0] for verb, known in calls), path


@pytest.mark.skipif(not SWAGGER, reason="CLOISTER_FIRECRACKER_SWAGGER names no firecracker.yaml")
def test_the_published_description_takes_every_request(tmp_path: Path, files: list[tuple[Path, bool]]) -> None:
    """Where Firecracker's own description is at hand, all requests of a start and a restore validate against it."""
    import jsonschema
    import yaml

    spec = yaml.safe_load(Path(SWAGGER).read_text(encoding="utf-8"))
    definitions = {
        name: {"additionalProperties": False, **each} if "properties" in each else each
        for name, each in spec["definitions"].items()
    }
    rate = firecracker.Rate(bytes_per_s=5, operations_per_s=6)
    tap = firecracker.Tap(name="tap0", mac="02:00:00:00:00:02")
    machine = firecracker.Machine(cmdline="x", disks=rate, network=rate, tap=tap, snapshots=True)
    place = firecracker.Place(directory="/run/cloister/vm")
    roles = ("kernel", "initramfs", "root", "var", "workspace")
    launch = VmLaunch(
        image="dev", version=1, manifest="", monitor="firecracker", accelerator="kvm", memory_mib=128, cpus=1,
        files=tuple(VmFile(role=role, path="") for role in roles), fields=(), inner=(), directory="/x",
        disk_bytes=1,
    )  # fmt: skip
    version = (1, 17, 0)
    requests = [
        *firecracker.start_requests(launch, machine, place, version),
        firecracker.load_snapshot("s", "m", place, version, resume=True, tap=tap),
        firecracker.create_snapshot("s", "m"),
        firecracker.set_state("Paused"),
        firecracker.set_balloon(3),
        firecracker.ask_to_end(),
    ]
    for request in requests:
        path = next(
            known for known in spec["paths"] if known.split("{")[0].rstrip("/") == request.path
            or ("{" in known and request.path.startswith(known.split("{")[0]))
        )  # fmt: skip
        parameters = spec["paths"][path][request.method.lower()]["parameters"]
        body = next(each["schema"] for each in parameters if each["in"] == "body")
        jsonschema.validate(json.loads(request.body), {**body, "definitions": definitions})
