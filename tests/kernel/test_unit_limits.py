"""Limits of a unit as the kernel has them: cgroups of both versions, rlimits of a process, time spans of systemd's."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from cloister.errors import StepError
from cloister.host import unit_limits, unit_start
from cloister.plan.unit import UnitLaunch

pytestmark = pytest.mark.kernel
UNIT = "cloister-run-x.service"
ASKED = (
    ("MemoryMax", "50331648"),
    ("MemorySwapMax", "0"),
    ("TasksMax", "40"),
    ("CPUQuota", "150%"),
    ("IOWeight", "50"),
)
V2 = {
    "memory.max": "50331648",
    "memory.swap.max": "0",
    "pids.max": "40",
    "cpu.max": "150000 100000",
    "io.weight": "default 50",
}
V1 = {
    "memory": {"memory.limit_in_bytes": "50331648"},
    "pids": {"pids.max": "40"},
    "cpu,cpuacct": {"cpu.cfs_quota_us": "150000", "cpu.cfs_period_us": "100000"},
    "blkio": {"blkio.weight": "250"},
}


class Host:
    """A stand-in for /proc and /sys/fs/cgroup."""

    def __init__(self, folder: Path) -> None:
        """Have one process, in no cgroup yet, and no swap."""
        self.folder, self.lines = folder, list[str]()
        self.swaps(0)

    def swaps(self, count: int) -> None:
        """Have so many swap spaces."""
        (self.folder / "swaps").write_text("Filename Type\n" + "/x file\n" * count)

    def group(self, tree: str, controllers: str, files: dict[str, str], unit: str = UNIT) -> None:
        """Be in a cgroup of this tree, which has these files."""
        place = self.folder / "cgroup" / tree / "cloister.slice" / unit
        place.mkdir(parents=True)
        for name, text in files.items():
            (place / name).write_text(f"{text}\n")
        self.lines.append(f"{len(self.lines)}:{controllers}:/cloister.slice/{unit}")

    def lacking(self) -> list[str]:
        """Return what of the asked is not in force."""
        (self.folder / "7").mkdir(exist_ok=True)
        (self.folder / "7/cgroup").write_text("\n".join(self.lines))
        found = unit_limits.cgroups_of(7, UNIT, str(self.folder / "cgroup"), str(self.folder))
        return unit_limits.not_in_force(ASKED, found, str(self.folder / "swaps"))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A host."""
    return Host(tmp_path)


def test_limits_of_version_two(host: Host) -> None:
    """What stands in the unit's cgroup counts."""
    host.group("", "", V2)
    assert host.lacking() == []


@pytest.mark.parametrize(
    ("file", "found", "name"),
    [
        ("memory.max", "max", "MemoryMax"), ("memory.max", "50335744", "MemoryMax"), ("pids.max", "max", "TasksMax"),
        ("pids.max", "41", "TasksMax"), ("cpu.max", "max 100000", "CPUQuota"),
        ("cpu.max", "200000 100000", "CPUQuota"), ("io.weight", "default 100", "IOWeight"),
    ],
)  # fmt: skip
def test_another_value_is_told(host: Host, file: str, found: str, name: str) -> None:
    """A limit that is looser than it was asked for is not in force, and no other is blamed."""
    host.group("", "", {**V2, file: found})
    assert host.lacking() == [name]


def test_a_host_without_controllers(host: Host) -> None:
    """Systemd takes limits without a word where the kernel has no controller for them: each is told."""
    host.group("", "", {})
    assert host.lacking() == ["MemoryMax", "TasksMax", "CPUQuota", "IOWeight"]
    host.swaps(1)
    assert "MemorySwapMax" in host.lacking()


def test_limits_of_version_one(host: Host) -> None:
    """Controllers of v1 have trees of their own, beside systemd's; a process that is elsewhere there is not limited."""
    (host.folder / "cgroup/unified").mkdir(parents=True)
    host.group("unified", "", {})
    for controllers, files in V1.items():
        host.group(controllers.partition(",")[0], controllers, files)
    assert host.lacking() == []
    host.swaps(1)
    assert host.lacking() == ["MemorySwapMax"]  # systemd sets none in v1


def test_a_cgroup_that_is_not_the_units(host: Host) -> None:
    """Where systemd left the process in a cgroup above or beside, that one's limits are not the unit's."""
    host.group("", "", V2, unit="other.service")
    assert host.lacking() == ["MemoryMax", "TasksMax", "CPUQuota", "IOWeight"]


def test_limits_of_the_process() -> None:
    """LimitCORE= and LimitNOFILE= are what the kernel says of the first process, soft and hard."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert unit_limits.process_limits_wrong((("LimitNOFILE", "17"),), os.getpid()) == "LimitNOFILE"
    if soft == hard:
        assert unit_limits.process_limits_wrong((("LimitNOFILE", str(hard)),), os.getpid()) == ""
    unit = UnitLaunch(unit=UNIT, account="cl-a", uid=os.getuid(), mounts=(), properties=(("LimitNOFILE", "17"),))
    with pytest.raises(StepError, match="systemd made something else"):
        unit_start.check_process(os.getpid(), unit, f"/{UNIT}")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("3630.5s", 3630.5), ("1h 30.500s", 3630.5), ("1month 2d", 2802600.0), ("90min", 5400.0), ("250ms", 0.25),
        ("1y", 31557600.0), ("infinity", float("inf")), ("30", 30.0),
    ],
)  # fmt: skip
def test_time_spans(text: str, wanted: float) -> None:
    """What systemd shows of RuntimeMaxUSec is compared with what was asked for as numbers (systemd.time(7))."""
    assert unit_limits.seconds(text) == wanted


def test_no_time_span() -> None:
    """What is none is an error, not zero."""
    for text in ("", "soon", "3 parsecs"):
        with pytest.raises(ValueError, match=f"^{text}$"):
            unit_limits.seconds(text)
