"""Installing, changing and removing Cloister in a real system: what is shown is done, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from support.machines import PYTHON, Machine

Make = Callable[..., Machine]

POLICY = """\
schema = 1

[agents.pi]
isolation = "unit"
command = ["/usr/bin/true"]

[users.alice]
agents = ["pi"]
roots = ["~/src"]
"""
TWO = (
    POLICY
    + """
[users.bob]
agents = ["pi"]
roots = ["~/p", "/srv/shared"]
"""
)
POLICY_FILE = "/etc/cloister/cloister.toml"
SYSTEM_FILE = "/var/lib/cloister/system.json"

LISTING = r"""
find / -xdev \( -path /proc -o -path /sys -o -path /tmp -o -path /var/log -o -path /var/lib/systemd -o -path /root \
    \) -prune -o -printf '%p %y %m %U:%G %l\n'
find /run -xdev \( -path /run/systemd -o -path /run/user -o -path /run/credentials -o -path /run/log \
    -o -path /run/udev -o -path /run/dbus \) -prune -o -printf '%p %y %m %U:%G %l\n'
"""
UNCHANGED = (
    "/etc/passwd-",
    "/etc/group-",
    "/etc/shadow-",
    "/etc/gshadow-",
    "/etc/.pwd.lock",
    "__pycache__",
    "/var/cache",
)


def install(machine: Machine, policy: str = POLICY) -> None:
    """Install a machine's first policy, and apply it."""
    machine.write(POLICY_FILE, policy)
    machine.run(["cloister", "setup", "--yes"])


def listing(machine: Machine) -> set[str]:
    """Return every file of the machine with its kind, rights and target; lines of passwd and group as well."""
    lines = machine.run(["sh", "-c", LISTING]).stdout.splitlines()
    kept = {line for line in lines if not any(name in line for name in UNCHANGED)}
    return kept | set(machine.run(["cat", "/etc/passwd", "/etc/group"]).stdout.splitlines())


def accounts(machine: Machine) -> dict[str, int]:
    """Return the accounts that hostd knows."""
    return {one["name"]: one["uid"] for one in json.loads(machine.read(SYSTEM_FILE))["accounts"]}


def apply_json(machine: Machine) -> dict[str, Any]:
    """Apply without asking; return what was done."""
    answer: dict[str, Any] = json.loads(machine.run(["cloister", "apply", "--yes", "--json"]).stdout)
    return answer


def test_a_first_setup_installs_daemons_that_answer(fresh_machine: Make) -> None:
    """On a machine without a policy, setup writes a starter, and both sockets listen with the right modes."""
    machine = fresh_machine()
    shown = machine.run(["cloister", "setup", "--dry-run"]).stdout
    assert "+ListenStream=/run/cloister/hostd.sock" in shown
    assert not machine.path("/etc/cloister").exists(), "a dry run changes nothing"
    machine.run(["cloister", "setup", "--yes"])
    assert "schema = 1" in machine.read(POLICY_FILE)
    for name, mode in (("hostd", 0o666), ("proxyd", 0o600)):
        assert machine.show(f"cloister-{name}.socket", "ActiveState") == "active"
        assert machine.path(f"/run/cloister/{name}.sock").stat().st_mode & 0o777 == mode
    again = machine.run(["cloister", "apply", "--yes"]).stdout
    assert again == "the system is as its policy says: nothing to do\n"
    assert machine.run(["cloister", "status"]).returncode == 0


def test_accounts_are_made_and_can_do_nothing_by_themselves(fresh_machine: Make) -> None:
    """Each agent of each user has its number, no login, no home, no subordinate ids, and neither cron nor at."""
    machine = fresh_machine()
    machine.write("/etc/cron.deny", "mallory\n")
    machine.write("/etc/at.allow", "root\ncl-pi-alice\n")
    install(machine)
    line = machine.run(["getent", "passwd", "cl-pi-alice"]).stdout.strip().split(":")
    assert line[2] == line[3] == "1900000000"
    assert line[5:] == ["/nonexistent", "/usr/sbin/nologin"]
    assert machine.run(["getent", "shadow", "cl-pi-alice"]).stdout.split(":")[1].startswith("!")
    assert machine.run(["getent", "group", "cl-pi-alice"]).stdout.split(":")[2] == "1900000000"
    for path in ("/etc/subuid", "/etc/subgid"):
        assert "cl-pi-alice" not in machine.read(path)
    assert not machine.path("/var/lib/systemd/linger/cl-pi-alice").exists()
    assert machine.read("/etc/cron.deny") == "mallory\ncl-pi-alice\n"
    assert machine.read("/etc/at.allow") == "root\n"
    su = machine.run(["su", "cl-pi-alice", "-c", "id"], check=False)
    assert su.returncode != 0
    assert "uid=0" in machine.run(["su", "root", "-c", "id"]).stdout


def test_a_mistake_in_the_policy_changes_nothing(fresh_machine: Make) -> None:
    """A misspelt key, a user who does not exist, a policy that others could change: each is refused, nothing moves."""
    machine = fresh_machine()
    install(machine)
    before = listing(machine)
    for text, mode, said in (
        (POLICY.replace("isolation", "isolaton"), 0o644, "isolation"),
        (POLICY.replace("users.alice", "users.alicia"), 0o644, "did you mean alice?"),
        (POLICY.split("[users", maxsplit=1)[0], 0o644, "[users] must name at least one"),
        (TWO, 0o666, "others than root could change it"),
    ):
        machine.write(POLICY_FILE, text, mode)
        refused = machine.run(["cloister", "apply", "--yes"], check=False)
        assert refused.returncode == 78
        assert said in refused.stderr
        machine.write(POLICY_FILE, POLICY)
        assert listing(machine) == before
    machine.write(POLICY_FILE, TWO)
    assert apply_json(machine)["done"]
    assert "cl-pi-bob" in accounts(machine)


def test_users_come_and_go_and_a_number_is_never_given_twice(fresh_machine: Make) -> None:
    """Who is not granted any more keeps the number; who comes later gets another; who comes back gets the old one."""
    machine = fresh_machine()
    install(machine, TWO)
    first = accounts(machine)
    machine.write(POLICY_FILE, POLICY)
    apply_json(machine)
    system = json.loads(machine.read(SYSTEM_FILE))
    assert {grant["user"] for grant in system["grants"]} == {"alice"}
    assert accounts(machine) == first
    machine.run(["useradd", "carol"])
    machine.write(POLICY_FILE, POLICY + '[users.carol]\nagents = ["pi"]\nroots = ["~/src"]\n')
    apply_json(machine)
    assert accounts(machine)["cl-pi-carol"] not in first.values()
    machine.write(POLICY_FILE, TWO)
    apply_json(machine)
    assert accounts(machine)["cl-pi-bob"] == first["cl-pi-bob"]


def test_what_is_not_granted_any_more_is_stopped(fresh_machine: Make) -> None:
    """A run of a user who was taken out of the policy ends with the next apply; another user's goes on."""
    machine = fresh_machine()
    install(machine, TWO)
    for user in ("alice", "bob"):
        unit = f"cloister-run-test{user}.service"
        machine.run(["systemd-run", f"--unit={unit}", "-p", f"User=cl-pi-{user}", "sleep", "600"])
    machine.write(POLICY_FILE, POLICY)
    shown = machine.run(["cloister", "apply", "--yes"]).stdout
    assert "stop cloister-run-testbob.service: cl-pi-bob is not granted any more" in shown
    assert machine.show("cloister-run-testbob.service", "ActiveState") == "inactive"
    assert machine.show("cloister-run-testalice.service", "ActiveState") == "active"


def test_what_was_changed_by_hand_is_shown_and_mended(fresh_machine: Make) -> None:
    """A unit file that somebody edited, one that was removed, other rights: named, shown as a difference, put right."""
    machine = fresh_machine()
    install(machine)
    unit = "/etc/systemd/system/cloister-proxyd.service"
    good = machine.read(unit)
    machine.write(unit, good.replace("NoNewPrivileges=yes", "NoNewPrivileges=no"))
    machine.run(["rm", "/etc/tmpfiles.d/cloister.conf"])
    machine.run(["chmod", "666", SYSTEM_FILE])
    assert machine.run(["cloister", "status"], check=False).returncode == 1
    shown = machine.run(["cloister", "apply", "--yes"]).stdout
    assert "-NoNewPrivileges=no\n+NoNewPrivileges=yes" in shown
    assert f"{unit} was changed by hand" in shown
    assert "/etc/tmpfiles.d/cloister.conf was removed by hand" in shown
    assert f"{SYSTEM_FILE} was given other rights by hand" in shown
    assert machine.read(unit) == good
    assert machine.path(SYSTEM_FILE).stat().st_mode & 0o777 == 0o644
    assert machine.run(["cloister", "status"]).returncode == 0


def test_a_file_that_is_not_ours_is_never_overwritten(fresh_machine: Make) -> None:
    """Somebody's own file at a place of ours stops setup before anything is done, and is named."""
    machine = fresh_machine()
    machine.write("/etc/systemd/system/cloister-hostd.service", "[Service]\nExecStart=/bin/true\n")
    before = listing(machine)
    refused = machine.run(["cloister", "setup", "--yes"], check=False)
    assert refused.returncode == 71
    assert "not-ours" in refused.stderr
    assert listing(machine) == before


@pytest.mark.parametrize("at", [3, 40])
def test_a_failure_in_the_middle_is_undone(fresh_machine: Make, at: int) -> None:
    """A step that the host refuses has every step before it undone: the machine is as it was, and setup works later."""
    machine = fresh_machine()
    machine.write(POLICY_FILE, POLICY)
    before = listing(machine)
    code = f"""
from cloister.errors import StepError
from cloister.host.system_apply import Applier
from cloister.runs import system_setup
def fail(number):
    if number == {at}:
        raise StepError("step-failed", "made up")
try:
    system_setup.carry_out(system_setup.prepare_setup(), Applier(before_step=fail))
except StepError as error:
    print(error.message)
"""
    assert machine.python(code).stdout == "made up\n"
    assert listing(machine) == before
    machine.run(["cloister", "setup", "--yes"])
    assert machine.run(["cloister", "status"]).returncode == 0


def test_a_directory_that_cannot_be_written_is_a_failure_that_is_undone(fresh_machine: Make) -> None:
    """With /etc/systemd read-only nothing is left of the attempt."""
    machine = fresh_machine()
    machine.write(POLICY_FILE, POLICY)
    machine.run(["mount", "--bind", "-o", "ro", "/etc/systemd", "/etc/systemd"])
    before = listing(machine)
    refused = machine.run(["cloister", "setup", "--yes"], check=False)
    assert refused.returncode == 71
    assert listing(machine) == before


KILLED = """
import os, signal, sys
from cloister.host.system_apply import Applier
from cloister.runs import system_setup
def die(number):
    if number == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
system_setup.carry_out(system_setup.prepare_setup(), Applier(before_step=die))
"""


def killed_and_continued(machine: Machine, number: int, before: set[str]) -> bool:
    """Kill a setup before a step, apply, look, uninstall, look; return whether there is such a step."""
    if machine.python(KILLED, str(number), check=False).returncode != -9:
        return False
    machine.run(["cloister", "apply", "--yes"])
    assert machine.run(["cloister", "status"]).returncode == 0
    for unit in ("cloister-hostd.socket", "cloister-firewall.service", "cloister-watchdog.service"):
        assert machine.show(unit, "ActiveState") == "active"
        assert machine.show(unit, "NeedDaemonReload") == "no"
    machine.run(["cloister", "uninstall", "--yes", "--purge"])
    machine.write(POLICY_FILE, POLICY)
    assert listing(machine) == before, number
    return True


def test_killed_between_steps_the_next_apply_goes_on(fresh_machine: Make) -> None:
    """SIGKILL with files half in place, or before systemd was told, is finished by the next apply."""
    machine = fresh_machine()
    machine.write(POLICY_FILE, POLICY)
    before = listing(machine)
    assert all(killed_and_continued(machine, number, before) for number in (1, 36, 44))


@pytest.mark.slow
@pytest.mark.timeout(1800)  # some 50 steps, each an apply or two
def test_killed_at_every_step_the_next_apply_goes_on(fresh_machine: Make) -> None:
    """SIGKILL before any step leaves something that the next apply finishes; uninstall removes all of it after."""
    machine = fresh_machine()
    machine.write(POLICY_FILE, POLICY)
    before = listing(machine)
    number = 0
    while killed_and_continued(machine, number, before):
        number += 1
    assert number > 40


def test_uninstall_leaves_no_trace(fresh_machine: Make) -> None:
    """With --purge the machine is as before: every file, user, group, unit and the packet filter."""
    machine = fresh_machine()
    machine.write("/etc/cron.deny", "mallory\n")
    before = listing(machine)
    install(machine, TWO)
    assert machine.run(["nft", "list", "table", "inet", "cloister"]).returncode == 0
    machine.run(["systemd-run", "--unit=cloister-run-x.service", "-p", "User=cl-pi-bob", "sleep", "600"])
    machine.run(["cloister", "uninstall", "--yes", "--purge"])
    assert listing(machine) == before
    assert machine.read("/etc/cron.deny") == "mallory\n"
    assert machine.run(["nft", "list", "table", "inet", "cloister"], check=False).returncode != 0
    assert "cloister" not in machine.run(["systemctl", "list-units", "--all", "--plain", "--no-legend"]).stdout
    assert machine.run(["cloister", "uninstall", "--yes"], check=False).returncode == 71


def test_uninstall_keeps_data_and_the_accounts_that_own_it(fresh_machine: Make) -> None:
    """Files of an agent stay, and its account with them; the next setup gives the same number. Others go."""
    machine = fresh_machine()
    install(machine, TWO)
    machine.write("/var/lib/cloister/agents/cl-pi-bob/0123456789abcdef/history", "words", owner="cl-pi-bob")
    first = accounts(machine)
    shown = machine.run(["cloister", "uninstall", "--yes"]).stdout
    assert "keep the files of cl-pi-bob" in shown
    assert machine.run(["getent", "passwd", "cl-pi-alice"], check=False).returncode != 0
    assert machine.run(["getent", "passwd", "cl-pi-bob"]).returncode == 0
    machine.run(["cloister", "setup", "--yes"])
    assert accounts(machine)["cl-pi-bob"] == first["cl-pi-bob"]
    assert machine.read("/var/lib/cloister/agents/cl-pi-bob/0123456789abcdef/history") == "words"


def test_only_root_and_only_a_root_owned_program(fresh_machine: Make) -> None:
    """Alice is told to use sudo; a program that she could change is never made root's daemon."""
    machine = fresh_machine()
    for verb in ("setup", "apply", "uninstall"):
        refused = machine.run(["cloister", verb], user="alice", check=False)
        assert refused.returncode == 77
        assert f"sudo cloister {verb}" in refused.stderr
    machine.run(["chown", "alice", PYTHON.replace("bin/python", "lib")])
    refused = machine.run(["cloister", "setup", "--yes"], check=False)
    assert refused.returncode == 69
    assert "installation-changeable" in refused.stderr


def test_nobody_there_means_no(fresh_machine: Make) -> None:
    """Without a terminal and without --yes nothing is done."""
    machine = fresh_machine()
    refused = machine.run(["cloister", "setup"], check=False)
    assert refused.returncode == 1
    assert not machine.path("/var/lib/cloister").exists()


def test_after_a_reboot_everything_is_as_declared(fresh_machine: Make) -> None:
    """What lies below /run comes again, the sockets listen, the packet filter is loaded."""
    machine = fresh_machine()
    install(machine)
    machine.reboot()
    assert machine.run(["cloister", "status"]).returncode == 0
    assert machine.run(["cloister", "apply", "--yes"]).stdout == "the system is as its policy says: nothing to do\n"
    assert machine.run(["nft", "list", "table", "inet", "cloister"]).returncode == 0
