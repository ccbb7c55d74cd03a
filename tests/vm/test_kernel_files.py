"""Files by LSM and fentry on Debian's stock kernel: what tracepoints cannot see, these do. In an emulated guest."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import cffi
import msgspec
import pytest
import small

import cloister
from support.sensor_rig import EVADE

pytestmark = [pytest.mark.kernel, pytest.mark.slow]

TIMEOUT_S = 240
HERE = Path(__file__).parent
PACKAGES = (cffi, msgspec, cloister)
"""What the guest gets of them."""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Return what the guest printed, by group of hooks; the first line of each says what was loaded."""
    image = os.environ.get("CLOISTER_TEST_VM", "").partition(":")[0]
    if not image:
        pytest.skip("CLOISTER_TEST_VM is not set; `make test-all` sets it")
    scratch = tmp_path_factory.mktemp("small")
    evade = scratch / "evade"
    assert os.system(f"cc -O2 -static -pthread -o {evade} {EVADE}") == 0  # noqa: S605  # two paths of ours
    kernel, program = Path(image) / "vmlinuz", HERE / "kernel_files_inside.py"
    status, said = small.run(kernel, program, {"/evade": evade}, scratch, TIMEOUT_S)
    assert status == 0, said[-4000:]
    found: dict[str, list[dict[str, Any]]] = {}
    for line in said.splitlines():
        if line.startswith("{"):
            one = json.loads(line)
            found.setdefault(one.get("group") or one["run"], []).append(one)
    return found


@pytest.mark.timeout(TIMEOUT_S + 60)
@pytest.mark.parametrize("group", ["lsm", "fentry"])
def test_all_hooks_load_and_attach(told: dict[str, list[dict[str, Any]]], group: str) -> None:
    """Debian's kernel takes every program but the tracepoint that it has under another name."""
    assert set(told[group][0]["refused"]) <= {"rings_submit", "rings_submit_before_6_4"}
    assert len(told[group][0]["refused"]) == 1
    assert told[group][0]["tiers"]["files"] == group
    assert told[group][0]["tiers"]["rings"] == group


@pytest.mark.timeout(TIMEOUT_S + 60)
@pytest.mark.parametrize("group", ["lsm", "fentry"])
def test_evasions_of_tracepoints_are_seen(told: dict[str, list[dict[str, Any]]], group: str) -> None:
    """io_uring, pages that are not there and relative paths: each opened file has the kernel's own path."""
    opened = {one["file"]["path"]: one for one in told[group][1:] if one["kind"] == "file.opened"}

    for path in ("/etc/group", "/etc/shells", "/etc/services"):
        assert opened[path]["file"]["resolved"]
        assert opened[path]["tier"] == group
    assert opened["/tmp/nowhere"]["error"] == 2  # what failed is still told, by the call


@pytest.mark.timeout(TIMEOUT_S + 60)
@pytest.mark.parametrize("group", ["lsm", "fentry"])
def test_every_change_of_files_is_seen(told: dict[str, list[dict[str, Any]]], group: str) -> None:
    """Creating, renaming, linking, changing and deleting are events with absolute paths."""
    seen = {
        (one["details"]["act"], one["file"]["path"], one["file"].get("target", ""))
        for one in told[group][1:]
        if "act" in one.get("details", {}) and "file" in one
    }

    assert seen >= {
        ("mkdir", "/tmp/made", ""), ("create", "/tmp/made/one", ""), ("rename", "/tmp/made/one", "/tmp/two"),
        ("link", "/tmp/three", "/tmp/two"), ("symlink", "/tmp/four", "elsewhere"), ("mode", "/tmp/two", ""),
        ("truncate", "/tmp/two", ""), ("owner", "/tmp/two", ""), ("delete", "/tmp/two", ""),
        ("delete", "/tmp/made", ""),
    }  # fmt: skip
