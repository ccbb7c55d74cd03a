"""From two states to the steps between them: nothing where nothing differs, and never over what is not ours."""

import pytest

from cloister.errors import StepError
from cloister.plan.system import InstallFile, MakeDirectory, ReloadManager, RemoveFile, SystemPlan
from cloister.plan.system_diff import (
    HEAD,
    Desired,
    Directory,
    File,
    Found,
    FoundFile,
    FoundUnit,
    Link,
    Made,
    Wanted,
    both,
    difference,
    digest,
    made,
)
from cloister.plan.system_render import as_text
from cloister.plan.unit import Account

ACCOUNT = Account(name="cl-pi-alice", uid=1_900_000_000, agent="pi", user="alice")
UNIT = "/etc/systemd/system/x.service"
DESIRED = Desired(
    accounts=(ACCOUNT,),
    daemons=("cloister-proxy",),
    directories=(Directory(path="/etc/sysusers.d", as_found=True), Directory(path="/var/lib/x", mode=0o711)),
    links=(Link(path="/run/x/bin", target="usr/bin"),),
    files=(File(path=UNIT, text="[Service]\n"), File(path="/var/lib/x/secret", text="s\n", mode=0o640, gid=7)),
    denied=("cl-pi-alice",),
    firewall="table inet cloister {}\n",
    units=(Wanted(unit="x.service", restart_for=(UNIT,), reload_for=("/var/lib/x/secret",)),),
)
THERE = Found(
    files={
        UNIT: FoundFile(text="[Service]\n", mode=0o644, uid=0, gid=0),
        "/var/lib/x/secret": FoundFile(text="s\n", mode=0o640, uid=0, gid=7),
    },
    directories={"/etc/sysusers.d": (0o700, 3, 3), "/var/lib/x": (0o711, 0, 0)},
    links={"/run/x/bin": "usr/bin"},
    names=("root", "cloister-proxy", "cl-pi-alice"),
    lines={"/etc/cron.deny": ("mallory", "cl-pi-alice")},
    units={"x.service": FoundUnit(active=True, enabled=True)},
    firewall="table inet cloister {}\n",
)
NOTHING = Found(directories={"/etc/sysusers.d": (0o755, 0, 0)}, lines={"/etc/cron.deny": ("mallory",)})
OURS = made(DESIRED, NOTHING, Made())


def steps(plan: SystemPlan) -> list[str]:
    """Return the steps in words."""
    return [step.describe() for step in plan.steps]


def test_a_system_as_declared_needs_nothing() -> None:
    """The second application finds nothing to do, and says so."""
    plan = difference(DESIRED, THERE, OURS)
    assert plan == SystemPlan()
    assert as_text(plan) == "the system is as its policy says: nothing to do\n"


def test_an_empty_system_gets_everything_in_an_order_that_works() -> None:
    """Users before their files, directories before what is in them, systemd's reading before units are started."""
    assert steps(difference(DESIRED, NOTHING, Made())) == [
        "make 2 users cloister-proxy, cl-pi-alice (1900000000)",
        "make directory /var/lib/x (root, 0711)",
        "link /run/x/bin to usr/bin",
        f"write {UNIT} (root, 0644)",
        "write /var/lib/x/secret (0:7, 0640)",
        "add cl-pi-alice to /etc/cron.deny",
        "load the packet filter of the accounts",
        "have systemd read its unit files again",
        "enable x.service",
        "start x.service",
    ]


def test_an_empty_declaration_takes_everything_back() -> None:
    """Uninstalling is the same difference, towards nothing: all of ours goes, a directory of the system's stays."""
    assert steps(difference(Desired(), THERE, OURS)) == [
        "stop x.service",
        "disable x.service",
        "remove link /run/x/bin",
        f"remove {UNIT}",
        "remove /var/lib/x/secret",
        "remove directory /var/lib/x, if it is empty",
        "take cl-pi-alice out of /etc/cron.deny",
        "take the packet filter of the accounts away (table inet cloister)",
        "have systemd read its unit files again",
    ]


def test_runs_end_after_their_grant_and_before_their_packet_filter() -> None:
    """None is started again by a list that still has it, and none lives on without a filter."""
    stop = (("cloister-run-1.service", "why"),)
    kept = Desired(firewall="table inet cloister {}\n", files=(File(path="/var/lib/x/list", text="new\n"),), stop=stop)
    order = steps(difference(kept, Found(firewall="table inet cloister {}\n"), Made()))
    assert order == ["write /var/lib/x/list (root, 0644)", "stop cloister-run-1.service: why"]
    order = steps(difference(Desired(stop=stop), THERE, OURS))
    assert order.index("disable x.service") < order.index("stop cloister-run-1.service: why")
    assert order.index("stop cloister-run-1.service: why") < order.index(f"remove {UNIT}")


def test_what_was_changed_by_hand_is_named_and_put_right() -> None:
    """Content, rights and absence are three ways to differ, and each is said."""
    files = {
        UNIT: FoundFile(text="[Service]\nUser=root\n", mode=0o644, uid=0, gid=0),
        "/var/lib/x/secret": FoundFile(text="s\n", mode=0o666, uid=0, gid=7),
    }
    changed = Found(**{name: getattr(THERE, name) for name in THERE.__struct_fields__} | {"files": files})
    plan = difference(DESIRED, changed, OURS)
    assert plan.notices == (
        f"{UNIT} was changed by hand",
        "/var/lib/x/secret was given other rights by hand",
    )
    assert steps(plan)[-1].startswith("restart x.service")
    shown = as_text(plan)
    assert "--- a/etc/systemd/system/x.service" in shown
    assert "\n-User=root" in shown


def test_a_changed_declaration_is_not_called_a_change_by_hand() -> None:
    """What differs from the policy but is what we wrote was not touched by anybody."""
    newer = Desired(files=(File(path=UNIT, text="[Service]\nUser=x\n"),))
    plan = difference(newer, THERE, OURS)
    assert not any(UNIT in notice for notice in plan.notices)


def test_a_packet_filter_that_is_gone_is_loaded_again() -> None:
    """The file alone says nothing about the kernel."""
    gone = Found(
        **{name: getattr(THERE, name) for name in THERE.__struct_fields__}
        | {"firewall_trouble": "the packet filter is not loaded"}
    )
    plan = difference(DESIRED, gone, OURS)
    assert steps(plan) == ["load the packet filter of the accounts"]
    assert plan.notices == ("the packet filter is not loaded",)


def test_a_file_of_somebody_else_is_refused_and_an_old_one_of_ours_is_not() -> None:
    """Without a record, our own first line tells ours; anything else is somebody's work."""
    for text, refused in (("# mine\n", True), (f"{HEAD}[Service]\n", False), ("[Service]\n", False)):
        found = Found(files={UNIT: FoundFile(text=text, mode=0o644, uid=0, gid=0)})
        if refused:
            with pytest.raises(StepError, match="did not write"):
                difference(Desired(files=DESIRED.files), found, Made())
        else:
            assert difference(Desired(files=DESIRED.files), found, Made())


@pytest.mark.parametrize("found", [Found(odd=(UNIT,)), Found(links={"/run/x/bin": "/tmp/evil"})], ids=["odd", "link"])
def test_a_link_or_device_in_our_place_is_refused(found: Found) -> None:
    """Whoever put it there meant something by it, and root follows it nowhere."""
    with pytest.raises(StepError) as caught:
        difference(DESIRED, found, Made())
    assert caught.value.reference == "not-ours"


def test_a_killed_application_is_finished() -> None:
    """Files may be in place and systemd not told: the next one tells it, and restarts what must read them."""
    left = (InstallFile(path=UNIT, text="[Service]\n"), ReloadManager())
    plan = difference(DESIRED, THERE, both(Made(), OURS), left)
    assert plan.steps[0] == ReloadManager()
    assert steps(plan)[1:] == [f"restart x.service: {UNIT} changed"]


def test_directories_that_were_there_are_not_ours() -> None:
    """Only what we made is removed later; what could not be removed yet stays ours."""
    assert OURS.directories == ("/var/lib/x",)
    again = made(DESIRED, THERE, OURS)
    assert again.directories == ("/var/lib/x",)
    assert made(Desired(), THERE, OURS).directories == ("/var/lib/x",)
    assert made(Desired(), NOTHING, OURS).directories == ()


def test_lists_of_those_allowed_lose_our_accounts() -> None:
    """With at.allow there is nothing to deny: nobody of ours may stand in it."""
    found = Found(lines={"/etc/at.allow": ("root", "cl-pi-alice")})
    assert steps(difference(Desired(denied=("cl-pi-alice",)), found, Made())) == [
        "take cl-pi-alice out of /etc/at.allow"
    ]


def test_a_reload_reaches_a_unit_that_reads_its_files_again() -> None:
    """A changed list of grants reloads, and does not end what runs."""
    newer = Desired(
        **{name: getattr(DESIRED, name) for name in DESIRED.__struct_fields__}
        | {"files": (DESIRED.files[0], File(path="/var/lib/x/secret", text="t\n", mode=0o640, gid=7))}
    )
    assert steps(difference(newer, THERE, OURS))[-1].startswith("reload x.service")
    assert digest("a") != digest("b")


def test_many_directories_are_counted_and_files_never_left_out() -> None:
    """The page stays readable, and every file is on it."""
    plan = SystemPlan(
        steps=(
            *(MakeDirectory(path=f"/run/{n}") for n in range(9)),
            *(RemoveFile(path=f"/etc/{n}", before="x\n") for n in range(9)),
        )
    )
    shown = as_text(plan)
    assert "make 9 directories: /run/0 …" in shown
    assert shown.count("--- a/etc/") == 9
