"""Landlock as one more layer: what it denies, what it still allows, and when it is demanded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import shim_rig
from shim_rig import Rig, Run, rig_of_test

pytestmark = pytest.mark.kernel
rig = pytest.fixture(rig_of_test)

WALLS = ["--landlock-ro", "/usr", "--landlock-ro", "/lib", "--landlock-ro", "/lib64", "--landlock-ro", "/bin"]


def abi_of(run: Run) -> str:
    """Return what the probe said about Landlock."""
    return next(item.removeprefix("landlock=") for item in run.probe if item.startswith("landlock="))


@pytest.fixture
def _landlock(rig: Rig) -> None:
    run = Run(rig)
    run.complete("true")
    if abi_of(run) == "0":
        pytest.skip("this kernel has no Landlock")


@pytest.mark.usefixtures("_landlock")
def test_only_named_paths_can_be_read_and_written(rig: Rig) -> None:
    """Below rw paths everything works, below ro paths reading and running, elsewhere nothing, bind mounts or not."""
    for name in ("open", "closed"):
        (rig.work / name).mkdir()
        (rig.work / name).chmod(0o777)
        (rig.work / name / "text").write_text(name)
    options = [*WALLS, "--landlock-rw", str(rig.work / "open"), "--landlock-rw", "/dev"]
    script = f"""cd {rig.work}/open
        cat text; echo new > new && cat new && mv new moved && mkdir d && ln -s x l && rm moved
        echo > /dev/null && echo good
        cat ../closed/text; echo x > ../closed/new; cat /etc/passwd; ls {rig.work}; echo x > /usr/x"""
    run = Run(rig, options=options)
    code, out, err = run.complete("sh", "-c", script)
    assert out == b"opennew\ngood\n"
    assert err.count(b"ermission denied") + err.count(b"Read-only") == 5
    assert not (rig.work / "closed/new").exists()
    code, out, _ = Run(rig, options=["--landlock", "off", *options]).complete("cat", str(rig.work / "closed/text"))
    assert (code, out) == (0, b"closed")


@pytest.mark.usefixtures("_landlock")
def test_a_missing_path_grants_nothing_and_stops_nothing(rig: Rig) -> None:
    """A rule for a path that is not there is skipped; the rest of the rules hold."""
    run = Run(rig, options=[*WALLS, "--landlock-rw", "/no/such/path"])
    assert run.complete("sh", "-c", "cat /etc/passwd")[0] == 1
    assert int(abi_of(run)) >= 1


@pytest.mark.usefixtures("_landlock")
def test_required_is_met_or_refused(rig: Rig) -> None:
    """`required` runs on a kernel with Landlock; `off` says so in the probe."""
    run = Run(rig, options=["--landlock", "required"])
    assert run.complete("true")[0] == 0
    run = Run(rig, options=["--landlock", "off"])
    assert run.complete("true")[0] == 0
    assert abi_of(run) == "off"


def test_required_without_landlock_stops_the_run(rig: Rig) -> None:
    """Attack: a kernel without Landlock (the system call refused). `required` ends with 125, `available` goes on."""
    number = 444
    refuse = shim_rig._bpf(0x20, 0, 0, 0) + shim_rig._bpf(0x15, 0, 1, number) + shim_rig._bpf(6, 0, 0, 0x00050000 | 38)
    unshare = {"x86_64": 272, "aarch64": 97}[os.uname().machine]
    refuse += shim_rig._bpf(0x15, 0, 1, unshare) + shim_rig._bpf(6, 0, 0, 0x00050001) + shim_rig.SECCOMP_ALLOW
    run = Run(rig, options=["--landlock", "required"], filter_text=refuse)
    assert run.complete("true")[0] == 125
    assert {"landlock=0", "verdict=failed"} <= set(run.probe)
    assert Run(rig, filter_text=refuse).complete("true")[0] == 0


@pytest.mark.usefixtures("_landlock")
def test_exec_and_agent_share_one_domain(rig: Rig) -> None:
    """Signals work between commands of one sandbox: `exec kill` reaches the agent."""
    run = Run(rig, options=[*WALLS, "--landlock-rw", "/dev", "--landlock-ro", "/proc"])
    run.go("sleep", "60")
    pid = int.from_bytes(run.until("inner", "R")[4:], "little")
    with Path(os.devnull).open("r+b") as null:
        run.execute(1, [null.fileno()] * 3, "sh", "-c", f"kill -TERM {pid}")
    assert run.wait() == 143
    run.close()
