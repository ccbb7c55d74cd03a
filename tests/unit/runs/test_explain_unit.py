"""What a unit's plan does to the file system: the answers of `explain` come from it."""

from __future__ import annotations

import msgspec
import pytest

from cloister.errors import CloisterError
from cloister.plan.steps import Launch, MakeDirectory, Plan
from cloister.plan.unit import Account, Grant, System, UnitLaunch, UnitMount
from cloister.runs.explain import Access, Explainer, Seen
from cloister.runs.explain_unit import unit_mounts
from cloister.runs.unit_plan import account_of

ROOT = "/home/alice/p"
FILES = {
    "/usr", "/usr/bin", "/usr/bin/sh", "/run/cloister/etc/1", "/run/cloister/etc/1/passwd", ROOT, f"{ROOT}/a",
    f"{ROOT}/.git", f"{ROOT}/.git/hooks", f"{ROOT}/secret", "/home/alice/.config/x",
}  # fmt: skip


def look(path: str) -> Seen:
    """A host with a few files, all of which alice may write."""
    return Seen("file", "", True, True) if path in FILES else Seen("absent")


def plan(*, merged: bool = True) -> Plan:
    """Return a plan as the system's broker makes one."""
    mounts = (
        UnitMount(kind="tmpfs", target="/home"),
        UnitMount(kind="tmpfs", target="/home/cl-pi-alice", private=True),
        UnitMount(kind="ro", target="/run/cloister/box", base="box"),
        UnitMount(kind="rw", target="/home/cl-pi-alice/.pi", base="state", source=".pi"),
        UnitMount(kind="ro", target="/home/cl-pi-alice/.config/x", base="carry", source=".config/x"),
        UnitMount(kind="rw", target=ROOT, base="workspace"),
        UnitMount(kind="ro", target=f"{ROOT}/.git/hooks", base="workspace", source=".git/hooks"),
        UnitMount(kind="mask-file", target=f"{ROOT}/secret"),
    )
    bound = [("BindReadOnlyPaths", "/usr"), ("BindReadOnlyPaths", "/run/cloister/etc/1:/etc")]
    bound += [] if merged else [("BindReadOnlyPaths", "-/bin")]
    unit = UnitLaunch(
        unit="u.service",
        account="cl-pi-alice",
        uid=1900000000,
        properties=tuple(bound),
        mounts=mounts,
        project="0" * 16,
    )
    launch = Launch(argv=("/shim", "inner"), command=("pi",), directory=ROOT, environment={}, unit=unit)
    return Plan(
        run="r", agent="pi", preset="pi", isolation="unit", workspace=ROOT, policy_digest="",
        steps=(MakeDirectory(path="/run/cloister/proxy/runs/r/box"), launch),
    )  # fmt: skip


def ask(path: str, *, merged: bool = True) -> Access:
    """Ask about a path."""
    made = plan(merged=merged)
    return Explainer(made, look, unit_mounts(made, "/home/alice")).ask(path)


@pytest.mark.parametrize(
    ("path", "readable", "writable"),
    [
        (f"{ROOT}/a", True, True),
        (f"{ROOT}/.git/hooks", True, False),
        (f"{ROOT}/secret", False, False),
        ("/home/alice/.config/x", False, False),
        ("/home/cl-pi-alice/.config/x", True, False),
        ("/home/cl-pi-alice/.pi", True, True),
        ("/home/cl-pi-alice/new", False, True),
        ("/etc/passwd", True, False),
        ("/bin/sh", True, False),
        ("/srv/x", False, False),
    ],
)
def test_paths(path: str, *, readable: bool, writable: bool) -> None:
    """Each kind of mount answers as the unit would, with the person's files where they are shown and nowhere else."""
    found = ask(path)
    assert (found.readable, found.writable) == (readable, writable), found


def test_a_host_without_merged_directories() -> None:
    """Where /bin is a directory of its own it is a mount, and no link to /usr."""
    assert ask("/bin/sh", merged=True).path == "/usr/bin/sh"
    assert ask("/bin/sh", merged=False).path == "/bin/sh"


def test_the_account_is_what_root_wrote_down(tmp_path) -> None:
    """A person's plan names the granted account; without a grant, or before `setup`, it says who must do what."""
    path = tmp_path / "system.json"
    with pytest.raises(CloisterError) as caught:
        account_of("alice", "pi", str(path))
    assert (caught.value.reference, caught.value.remedy) == ("hostd-missing", "sudo cloister setup")
    account = Account(name="cl-pi-alice", uid=1900000000, agent="pi", user="alice")
    grant = Grant(user="alice", agent="pi", account="cl-pi-alice", roots=("~/p",))
    path.write_bytes(msgspec.json.encode(System(accounts=(account,), grants=(grant,))))
    assert account_of("alice", "pi", str(path)) == account
    with pytest.raises(CloisterError) as caught:
        account_of("bob", "pi", str(path))
    assert (caught.value.reference, caught.value.remedy) == ("not-granted", "sudo cloister apply")
