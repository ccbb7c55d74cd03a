"""Machines with KVM that start from a template, and that go on from a kept memory, in an emulated machine.

What tests/microvm shows of emulated guests, once more where the processor's state is the kernel's and not QEMU's.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator

import pytest

from support.guest_image import CarriedImage, see_kvm
from support.guest_user import GuestUser
from support.homes import make_home, make_workspace

BOOT_S = 400
COUNT = "n=0; while :; do n=$((n+1)); echo $n > /tmp/now; sleep 0.5; done"
LOOK = (
    "cat /proc/sys/kernel/random/uuid /etc/machine-id; head -c 16 /dev/urandom | od -An -tx1; date +%s; "
    "cat /sys/devices/system/clocksource/clocksource0/current_clocksource; grep -c -w -e svm -e vmx /proc/cpuinfo"
)

pytestmark = [pytest.mark.kernel, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def user(image: CarriedImage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestUser]:
    """A user whose machines may start from templates."""
    home = make_home(tmp_path_factory.mktemp("warm") / "home")
    make_workspace(home / "project")
    user = GuestUser(home, image)
    assert see_kvm(home, user.runtime) == ""
    text = (home / ".config/cloister/cloister.toml").read_text(encoding="utf-8").replace("warm = false\n", "")
    user.write_policy(text)
    yield user
    user.run("stop", "--all", "--grace", "1s", cwd=home, timeout_s=BOOT_S)
    user.close()


def told(user: GuestUser, *words: str) -> str:
    """Return what a command says, and print how long it took."""
    began = time.monotonic()
    done = user.run(*words, cwd=user.home / "project", timeout_s=BOOT_S)
    sys.stdout.write(f"{' '.join(words[:3])} took {time.monotonic() - began:.1f} s\n")
    assert done.returncode == 0, (words, done.stderr, console(user))
    return done.stdout


def console(user: GuestUser) -> str:
    """Return what the last guest printed."""
    return user.run("logs", "--console", "last", cwd=user.home, timeout_s=60).stdout[-2000:]


def test_machines_with_kvm_start_from_a_template(user: GuestUser) -> None:
    """Two from one template differ in what must, have the time, and no processor in which they could have guests."""
    told(user, "vm", "warm", "shell")
    (template,) = json.loads(told(user, "vm", "snapshots", "--json"))
    seen = []
    for _ in range(2):
        lines = told(user, "run", "shell", "--", "sh", "-c", f"{LOOK}; true").splitlines()
        uuid, machine_id, drawn, clock, source, nested = lines
        seen.append({uuid, machine_id, drawn})
        assert abs(time.time() - int(clock)) < 60
        assert source in {"kvm-clock", "tsc"}
        assert nested == "0"
    plans = [json.loads(path.read_text()) for path in sorted(user.state.glob("runs/*/plan.json"))[-2:]]

    assert template["kind"] == "template"
    assert not seen[0] & seen[1]
    assert [plan["steps"][-1]["vm"]["accelerator"] for plan in plans] == ["kvm"] * 2
    assert all(plan["steps"][-1]["vm"]["template"] for plan in plans)
    assert [receipt["reason"] for receipt in user.receipts()[-2:]] == ["exited"] * 2


def test_a_machine_with_kvm_goes_on_from_its_memory(user: GuestUser) -> None:
    """A counter goes on in the run that was kept, and in the one that goes on from there, from where it stood."""
    run = told(user, "run", "--detach", "shell", "--", "/bin/sh", "-c", COUNT).strip()

    def now(which: str) -> int:
        return int(told(user, "exec", which, "--", "cat", "/tmp/now"))

    while now(run) < 3:
        time.sleep(1)
    kept = json.loads(told(user, "vm", "snapshot", run, "counting", "--json"))
    stood = now(run)
    other = told(user, "vm", "restore", "counting").strip()
    first = now(other)
    time.sleep(3)

    assert kept["memory"] is True, kept["why"]
    assert first >= 3
    assert now(other) > first
    assert now(run) > stood
    clock = int(told(user, "exec", other, "--", "date", "+%s"))
    assert abs(time.time() - clock) < 60
