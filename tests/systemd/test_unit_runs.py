"""Runs under systemd, from the words of a user to the exit code: her broker, hostd, the system's broker, a unit."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from runs_rig import ASK_PROXY, POLICY, POLICY_FILE, Rig

from support.machines import Machine

TERMINAL = """
import os, sys
from pathlib import Path
from support.terminal import Terminal
with Terminal(["cloister", *sys.argv[2:]], cwd=Path.cwd(), env=dict(os.environ)) as terminal:
    exec(sys.argv[1])
"""


@pytest.fixture(scope="module")
def rig(suite: str, layers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """One installed machine for the tests of this file, on Debian 12 and 13."""
    with Machine(suite, layers(suite), tmp_path_factory.mktemp(f"runs-{suite}")) as machine:
        yield Rig(machine)


@pytest.fixture(autouse=True)
def nothing_left(rig: Rig) -> Iterator[None]:
    """After each test nothing of its runs is left anywhere."""
    yield
    rig.clean()


# --- what a run is -------------------------------------------------------------------------------


def test_who_and_where(rig: Rig) -> None:
    """The agent is an account of its own, in the caller's directory; what it makes is the caller's."""
    done = rig.sh("id -un; pwd; echo made >new", cwd=f"{rig.project}/sub")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["cl-sh-alice", f"{rig.project}/sub"]
    info = rig.machine.path(f"{rig.project}/sub/new").stat()
    assert (info.st_uid, info.st_gid) == (1000, 1000)


@pytest.mark.parametrize(
    ("words", "code"),
    [(["/bin/true"], 0), (["sh", "-c", "exit 7"], 7), (["sh", "-c", "kill -9 $$"], 137),
     (["no-such-program"], 127), (["./sub/data"], 126)],
)  # fmt: skip
def test_exit_codes(rig: Rig, words: list[str], code: int) -> None:
    """The command's own status is that of `cloister run`; 126, 127 and 128+n are those of env(1) and a shell."""
    rig.machine.write(f"{rig.project}/sub/data", "no program\n", owner="alice")
    assert rig.cloister("run", "sh", "--", *words).returncode == code


def test_streams_are_the_callers(rig: Rig) -> None:
    """Standard input ends where it ends, and output and error stay apart."""
    done = rig.sh("cat; echo problem >&2; cat | wc -c", input="spoken\n")
    assert (done.stdout.split(), done.stderr) == (["spoken", "0"], "problem\n")


def test_fifty_megabytes_come_back_as_they_went(rig: Rig) -> None:
    """Bytes are carried by the pipe itself, whatever they are, as many as there are."""
    script = "head -c 50000000 /dev/urandom >big; cloister run sh -- cat <big | cmp - big && echo same; rm big"
    done = rig.machine.run(["sh", "-c", script], user="alice", cwd=rig.project)
    assert done.stdout == "same\n"


def test_a_workspace_with_any_name(rig: Rig) -> None:
    """Spaces, colons, percent signs and backslashes in a path are what they are."""
    path = "/home/alice/p/a b:%n\\c"
    rig.machine.run(["mkdir", path], user="alice")
    done = rig.sh("pwd; echo x >y", cwd=path)
    assert (done.returncode, done.stdout) == (0, f"{path}\n"), done.stderr
    rig.machine.run(["rm", "-r", path], user="alice")


def test_the_record_of_a_run_is_the_users(rig: Rig) -> None:
    """Plan, receipt and events are among the user's own records, under the id that the unit has, and tell what was."""
    assert rig.sh("true").returncode == 0
    receipt = rig.receipt()
    assert receipt["isolation"] == "unit"
    assert receipt["exit_code"] == 0
    assert "verdict=passed" in receipt["probe"]
    assert receipt["workspace"] == rig.project
    assert receipt["host"]["unit"] == f"cloister-run-{receipt['id']}.service"
    assert json.loads(rig.cloister("inspect", "last", "--json").stdout)


def test_the_system_has_a_record_of_its_own(rig: Rig) -> None:
    """The system's broker keeps plan and receipt as well, and nobody but it and root can read them."""
    rig.sh("true")
    run = rig.receipt()["id"]
    kept = json.loads(rig.machine.read(f"/var/lib/cloister/proxy/runs/{run}/run.json"))
    assert (kept["user"], kept["status"]) == ("alice", "finished")
    denied = rig.machine.run(["ls", "/var/lib/cloister/proxy/runs"], user="alice", check=False)
    assert denied.returncode != 0


# --- further commands ----------------------------------------------------------------------------


def test_detached_runs(rig: Rig) -> None:
    """A detached run is listed, takes further commands with their own streams and codes, and ends when told to."""
    run = rig.detach("echo begun; trap 'echo told; exit 5' TERM; while :; do sleep 0.1; done")
    assert run in rig.cloister("ps").stdout
    done = rig.cloister("exec", run, "--", "sh", "-c", "id -un; cat; exit 3", input="given")
    assert (done.returncode, done.stdout) == (3, "cl-sh-alice\ngiven")
    rig.until(lambda: "begun" in rig.cloister("logs", run).stdout)
    assert rig.cloister("stop", run).returncode == 0
    assert rig.receipt(run)["exit_code"] == 5
    assert "told" in rig.cloister("logs", run).stdout
    assert rig.cloister("exec", run, "--", "true").returncode == 125


def test_a_detached_run_whose_agent_never_ran(rig: Rig) -> None:
    """There is no id of a run that cannot be worked with, but the reason and the code that any start has."""
    rig.machine.write(f"{rig.project}/sub/data", "no program\n", owner="alice")
    for program, code in (("no-such-program", 127), ("./sub/data", 126)):
        failed = rig.cloister("run", "-d", "sh", "--", program)
        assert (failed.returncode, failed.stdout, bool(failed.stderr)) == (code, "", True)


def test_a_command_of_exec_ends_with_its_client(rig: Rig) -> None:
    """Killing the client of `exec` ends that command, and the run goes on."""
    run = rig.detach("sleep 60")
    client = rig.machine.popen(["cloister", "exec", run, "--", "sleep", "4711"], user="alice", cwd=rig.project)

    def sleeps() -> bool:
        return rig.machine.run(["pgrep", "-f", "^sleep 4711"], check=False).returncode == 0

    rig.until(sleeps)
    client.kill()
    client.wait()
    rig.until(lambda: not sleeps())
    assert run in rig.cloister("ps").stdout
    rig.cloister("stop", run)


def test_two_runs_at_once(rig: Rig) -> None:
    """Runs of one agent and workspace stand beside one another; the first to end leaves the other its protections."""
    first, second = rig.detach("sleep 60"), rig.detach("sleep 60")
    rig.cloister("stop", first)
    done = rig.cloister("exec", second, "--", "sh", "-c", "echo x >.mcp.json")
    assert done.returncode != 0
    rig.cloister("stop", second)


# --- signals and terminals -----------------------------------------------------------------------


def test_a_signal_to_the_client_is_the_agents(rig: Rig) -> None:
    """SIGTERM reaches the agent, whose own answer to it counts."""
    client = rig.machine.popen(
        ["cloister", "run", "sh", "--", "sh", "-c", "trap 'exit 9' TERM; : >kept; while :; do sleep 0.1; done"],
        user="alice", cwd=rig.project,
    )  # fmt: skip
    rig.until(lambda: rig.machine.path(f"{rig.project}/kept").exists())
    rig.machine.run(
        [
            "kill",
            "-TERM",
            rig.machine.run(["pgrep", "-u", "alice", "-f", "cloister-shim outer|cloister run"]).stdout.split()[0],
        ]
    )
    assert client.wait(20) == 9
    rig.machine.path(f"{rig.project}/kept").unlink()


def terminal(rig: Rig, steps: str, *words: str) -> str:
    """Run `cloister` on a terminal inside the machine; `steps` are Python with `terminal`."""
    done = rig.machine.python(TERMINAL, steps, *words, user="alice", cwd=rig.project)
    return str(done.stdout)


def test_a_terminal(rig: Rig) -> None:
    """With a terminal the agent has one, of the same size, and what is typed arrives."""
    steps = (
        "terminal.until('rows 24'); terminal.type('hello\\n'); terminal.until('got hello');"
        "print(terminal.process.wait(20))"
    )
    script = 'stty -a | head -1; tty; read x; echo "got $x"'
    assert terminal(rig, steps, "run", "sh", "--", "sh", "-c", script).strip() == "0"


def test_ctrl_c(rig: Rig) -> None:
    """Ctrl-C interrupts the agent, and `cloister run` reports it as a shell would."""
    steps = "terminal.until('ready'); terminal.type('\\x03'); print(terminal.process.wait(20))"
    # No fork behind the word: dash loses a SIGINT that comes while it makes a child, with any terminal.
    assert terminal(rig, steps, "run", "sh", "--", "sh", "-c", "echo ready; exec sleep 60").strip() == "130"


def test_exec_on_a_terminal(rig: Rig) -> None:
    """`cloister exec` gives a further command a terminal as well."""
    run = rig.detach("sleep 60")
    steps = "terminal.until('/dev/pts/'); print(terminal.process.wait(20))"
    assert terminal(rig, steps, "exec", run, "--", "tty").strip() == "0"
    rig.cloister("stop", run)


# --- limits, egress, policy ----------------------------------------------------------------------


def test_runtime(rig: Rig) -> None:
    """A run ends after its `runtime_max` with 124."""
    done = rig.sh("sleep 30", agent="short")
    assert done.returncode == 124
    assert "timed-out" in done.stderr


def test_limits_that_the_kernel_keeps(rig: Rig) -> None:
    """Limits without a controller, of which systemd says nothing, are told; who insists on them starts nothing."""
    there = {"memory", "pids"} <= rig.machine.controllers
    assert rig.sh("true", agent="small").returncode == 0
    said = rig.receipt()
    assert (0 < said["host"].get("memory_peak", 0) <= 48 << 20) is there, said["host"]
    memory = next(words for words in said["limits"] if words.startswith("memory_max"))
    assert ("not in force" in memory) is not there, said
    assert any("memory_max 48M is not in force" in notice for notice in said["notices"]) is not there
    done = rig.sh("echo limited", agent="kept")
    assert (done.stdout == "limited\n") is there, done.stderr
    assert there or "limits-not-in-force" in done.stderr
    rig.clean()


def test_memory(rig: Rig) -> None:
    """A run that uses up its memory is ended where that is in force, and its receipt says so; what needs less lives."""
    there = "memory" in rig.machine.controllers
    assert (rig.sh("head -c 200000000 /dev/zero | tail >/dev/null", agent="small").returncode != 0) is there
    assert any("memory_max" in warning for warning in rig.receipt()["warnings"]) is there, rig.receipt()
    assert rig.sh("true", agent="small").returncode == 0


def test_egress_is_decided_and_recorded(rig: Rig) -> None:
    """Hosts that no rule names are refused inside, and the user's own records say which and why."""
    done = rig.cloister("run", "web", "--", "/bin/bash", "-c", ASK_PROXY, "denied.example:443")
    assert " 403 " in done.stdout, done.stderr
    assert any("denied.example" in line for line in rig.receipt()["denied"])
    assert "denied.example" in rig.cloister("why", "last").stdout


def test_a_changed_policy_reaches_living_runs(rig: Rig) -> None:
    """`systemctl reload cloister-proxyd` brings the system's policy to runs that are under way."""
    run = rig.detach("sleep 60", agent="web")

    def answer(host: str) -> str:
        return str(rig.cloister("exec", run, "--", "/bin/bash", "-c", ASK_PROXY, host).stdout)

    assert " 403 " not in answer("allowed.example:443")
    try:
        rig.machine.write(POLICY_FILE, POLICY.replace('"allowed.example:443", ', ""))
        rig.machine.run(["systemctl", "reload", "cloister-proxyd.service"])
        rig.until(lambda: " 403 " in answer("allowed.example:443"))
        assert " 403 " not in answer("other.example:443")
    finally:
        rig.machine.write(POLICY_FILE, POLICY)
        rig.cloister("stop", run)


def test_a_grant_that_is_taken_back_ends_the_run(rig: Rig) -> None:
    """Who is taken out of the system's policy has no living run after its reload; others keep theirs."""
    run, other = rig.detach("sleep 60", agent="web"), rig.detach("sleep 60")
    try:
        rig.machine.write(POLICY_FILE, POLICY.replace('"small", "web"', '"small"'))
        rig.machine.run(["systemctl", "reload", "cloister-proxyd.service"])
        rig.until(lambda: run not in rig.cloister("ps").stdout)
        assert rig.receipt(run)["reason"] == "grant-revoked"
        assert rig.cloister("exec", other, "--", "true").returncode == 0
    finally:
        rig.machine.write(POLICY_FILE, POLICY)
        rig.machine.run(["systemctl", "reload", "cloister-proxyd.service"])
        rig.cloister("stop", other)


def test_a_directory_is_no_stream(rig: Rig) -> None:
    """A directory as standard input of a further command would open the host's files: it is refused."""
    run = rig.detach("sleep 60")
    done = rig.machine.run(
        ["sh", "-c", 'cloister exec "$0" -- ls /proc/self/fd/0/ </', run], user="alice", cwd=rig.project, check=False
    )
    assert done.returncode == 125, done.stdout
    assert "stdio-directory" in done.stderr
    rig.cloister("stop", run)


def test_a_project_may_only_narrow(rig: Rig) -> None:
    """`.cloister.toml` of a workspace takes hosts away, and is refused when it adds one."""
    path = f"{rig.project}/.cloister.toml"
    rig.machine.write(path, 'schema = 1\n[agents.web]\negress = { allow = ["other.example:443"] }\n', owner="alice")
    done = rig.cloister("run", "web", "--", "/bin/bash", "-c", ASK_PROXY, "allowed.example:443")
    assert " 403 " in done.stdout, done.stderr
    rig.machine.write(path, 'schema = 1\n[agents.web]\negress = { allow = ["more.example:443"] }\n', owner="alice")
    done = rig.cloister("run", "web", "--", "true")
    assert (done.returncode, "policy-widens" in done.stderr) == (125, True), done.stderr
    rig.machine.path(path).unlink()


def test_the_users_own_policy_may_only_narrow(rig: Rig) -> None:
    """A user's table of an agent that the system has takes from it what it says, under systemd as well."""
    path = "/home/alice/.config/cloister/cloister.toml"
    own = 'schema = 1\n[agents.web]\nisolation = "unit"\ncommand = ["/bin/sh"]\n'
    own += 'egress = { allow = ["other.example:443"] }\n'
    rig.machine.write(path, own, owner="alice")
    try:
        done = rig.cloister("run", "web", "--", "/bin/bash", "-c", ASK_PROXY, "allowed.example:443")
        assert " 403 " in done.stdout, done.stderr
        rig.machine.write(path, own.replace("other.example", "more.example"), owner="alice")
        done = rig.cloister("run", "web", "--", "true")
        assert (done.returncode, "policy-widens" in done.stderr) == (125, True), done.stderr
    finally:
        rig.machine.path(path).unlink()


def test_a_unit_needs_the_systems_policy(rig: Rig) -> None:
    """A user's own `isolation = "unit"` gives no system user: it is refused, and nothing weaker is started."""
    path = "/home/alice/.config/cloister/cloister.toml"
    rig.machine.write(path, 'schema = 1\n[agents.box]\nisolation = "unit"\ncommand = ["/bin/sh"]\n', owner="alice")
    try:
        done = rig.cloister("run", "box", "--", "true")
        assert (done.returncode, "unit-needs-system-policy" in done.stderr) == (125, True), done.stderr
    finally:
        rig.machine.path(path).unlink()


def test_plan_shows_what_is_asked_of_root(rig: Rig) -> None:
    """PF19: `cloister plan` has, for any person, the properties and mounts that a run then gets, and starts nothing."""
    planned = json.loads(rig.cloister("plan", "--json", "sh", "--", "/bin/sh", "-c", "true").stdout)
    assert not rig.units()
    rig.sh("true")
    run = rig.receipt()["id"]
    real = json.loads(rig.machine.read(f"/var/lib/cloister/proxy/runs/{run}/plan.json"))
    shown, got = planned["steps"][-1], real["steps"][-1]
    assert shown["unit"]["unit"] == got["unit"]["unit"].replace(run, planned["run"])
    for key in ("account", "uid", "properties", "mounts", "project", "ownership"):
        assert shown["unit"][key] == got["unit"][key], key
    assert (shown["argv"], shown["command"], planned["egress"]) == (got["argv"], got["command"], real["egress"])
    page = rig.cloister("plan", "sh").stdout
    assert "as cl-sh-alice (19" in page
    assert "PrivateNetwork=yes" in page
    denied = rig.cloister("plan", "web", user="bob", cwd="/home/bob/p/one")
    assert (denied.returncode, "not-allowed" in denied.stderr) == (77, True), denied.stderr


def test_explain_tells_the_truth(rig: Rig) -> None:
    """What `explain` says of paths and hosts is what the unit then finds."""
    rig.machine.write(f"{rig.project}/kept", "x", owner="alice")
    rig.machine.write("/home/alice/own", "x", owner="alice")
    for path, readable, writable in (
        (f"{rig.project}/kept", True, True),
        (f"{rig.project}/.git/hooks", True, False),
        ("/home/alice/own", False, False),
        ("/etc/passwd", True, False),
        ("/etc/cloister/cloister.toml", False, False),
        ("/bin/sh", True, False),
        ("/var/lib/cloister/system.json", False, False),
    ):
        told = json.loads(rig.cloister("explain", "sh", path, "--json").stdout)
        assert (told["allowed"], told["writable"]) == (readable, writable), told
        found = rig.sh(f"test -r {path}; r=$?; test -w {path}; echo $r $?").stdout.split()
        assert found == [str(int(not readable)), str(int(not writable))], path
    assert rig.cloister("explain", "web", "allowed.example").returncode == 0
    assert rig.cloister("explain", "web", "denied.example").returncode == 1


def test_check_and_reload_say_whose_units_are(rig: Rig) -> None:
    """`check` finds nothing wrong with units of the system, and warns of one that a person's own policy asks for."""
    told = rig.cloister("check")
    assert (told.returncode, "will not start" in told.stdout) == (0, False), told.stdout
    path = "/home/alice/.config/cloister/cloister.toml"
    own = 'schema = 1\n[agents.mine]\nisolation = "unit"\ncommand = ["/bin/sh"]\n'
    rig.machine.write(path, own + own.partition("\n")[2].replace("mine", "sh"), owner="alice")
    try:
        said = rig.cloister("check").stdout
        assert "the agent 'mine' will not start: only the system's policy" in said
        assert "'sh' will not start" not in said
        assert "systemctl reload cloister-proxyd" in rig.cloister("policy", "reload").stdout
    finally:
        rig.machine.path(path).unlink()


def test_who_may_not(rig: Rig) -> None:
    """Agents that are not granted, and directories outside of the roots, are refused with 125 and a reason."""
    done = rig.cloister("run", "web", "--", "true", user="bob", cwd="/home/bob/p/one")
    assert (done.returncode, "not-allowed" in done.stderr) == (125, True), done.stderr
    rig.machine.run(["mkdir", "-p", "elsewhere"], user="alice")
    done = rig.cloister("run", "sh", "--", "true", cwd="/home/alice/elsewhere")
    assert (done.returncode, "outside" in done.stderr) == (125, True), done.stderr
    assert rig.cloister("run", "sh", "--", "true", user="bob", cwd="/home/bob/p/one").returncode == 0


def test_a_replaced_protected_file_ends_the_run(rig: Rig) -> None:
    """When the person's own tools replace a file that is mounted read-only, its protection is gone: the run ends."""
    config = f"{rig.project}/.git/config"
    rig.machine.write(config, "[core]\n", owner="alice")
    rig.machine.write(f"{rig.project}/.git/HEAD", "ref: refs/heads/main\n", owner="alice")
    rig.machine.run(["mkdir", "-p", f"{rig.project}/.git/objects", f"{rig.project}/.git/refs"], user="alice")
    run = rig.detach("sleep 60")
    done = rig.cloister("exec", run, "--", "sh", "-c", "echo x >>.git/config")
    assert done.returncode != 0
    rig.machine.run(["sh", "-c", 'echo "[core]" >new; mv new "$0"', config], user="alice", cwd=f"{rig.project}/.git")
    rig.until(lambda: not rig.units())
    assert rig.receipt(run)["reason"] == "protection-lost"


def test_only_root_asks_the_systems_broker(rig: Rig) -> None:
    """The socket of the system's broker opens for root alone, and a peer with another uid gets no answer."""
    code = (
        "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/cloister/proxyd.sock');"
        "s.sendall(bytes(9)); print(s.recv(9))"
    )
    done = rig.machine.python(code, user="alice", check=False)
    assert "PermissionError" in done.stderr
    passed = (
        "import os, socket; s = socket.socket(socket.AF_UNIX); os.seteuid(0)\n"
        "os.setgroups([]); os.chmod('/run/cloister/proxyd.sock', 0o666); os.seteuid(1000)\n"
        "try:\n s.connect('/run/cloister/proxyd.sock'); s.settimeout(10); print(s.recv(9))\n"
        "finally:\n os.seteuid(0); os.chmod('/run/cloister/proxyd.sock', 0o600)\n"
    )
    done = rig.machine.python(passed)
    assert done.stdout == "b''\n", done.stderr


# --- whoever is killed ---------------------------------------------------------------------------


def kill_client(rig: Rig, run: str) -> None:
    """Kill the outer half of a detached run."""
    del run
    pids = rig.machine.run(["pgrep", "-u", "alice", "-f", "cloister-shim outer"]).stdout.split()
    for pid in pids:
        rig.kill(int(pid))


def kill_users_broker(rig: Rig, run: str) -> None:
    """Kill alice's broker."""
    del run
    rig.kill(rig.broker_pid())


def kill_systems_broker(rig: Rig, run: str) -> None:
    """Kill the system's broker."""
    del run
    rig.kill(rig.main_pid("cloister-proxyd.service"))


def kill_first_process(rig: Rig, run: str) -> None:
    """Kill the shim in the unit."""
    rig.kill(rig.main_pid(f"cloister-run-{run}.service"))


def stop_unit(rig: Rig, run: str) -> None:
    """Let root stop the unit as any other."""
    rig.machine.run(["systemctl", "stop", f"cloister-run-{run}.service"])


@pytest.mark.parametrize("kill", [kill_client, kill_users_broker, kill_systems_broker, kill_first_process, stop_unit])
def test_whoever_dies_the_run_ends(rig: Rig, kill: Callable[[Rig, str], None]) -> None:
    """When any party of a run is killed, its unit ends, everything is undone, and the next run starts as ever."""
    run = rig.detach("setsid sleep 300 & sleep 300")
    assert rig.units() == [f"cloister-run-{run}.service"]
    kill(rig, run)
    rig.until(lambda: not rig.units(), 30, rig.remains)
    assert rig.sh("true").returncode == 0
    rig.clean()
    assert rig.receipt(run)["exit_code"] != 0


def test_hostd_may_be_gone_while_a_run_lasts(rig: Rig) -> None:
    """Root's daemon is not needed while a run lasts: it is started again to end it."""
    run = rig.detach("sleep 300")
    if pid := rig.main_pid("cloister-hostd.service"):
        rig.kill(pid)
    time.sleep(0.3)
    assert rig.cloister("exec", run, "--", "true").returncode == 0
    assert rig.cloister("stop", run).returncode == 0


def test_a_caller_that_leaves_while_the_unit_is_made(rig: Rig) -> None:
    """A client killed at any moment of a start leaves nothing behind."""
    delays = "0 0.02 0.05 0.08 0.1 0.12 0.15 0.18 0.2 0.25 0.3"
    script = f"for delay in {delays}; do cloister run sh -- sleep 300 & sleep $delay; kill -9 $!; done"
    rig.machine.run(["bash", "-c", script], user="alice", cwd=rig.project)
    rig.clean(40)
