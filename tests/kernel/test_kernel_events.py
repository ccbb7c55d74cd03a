"""Kernel events on a real kernel: what agents do is in the log, losses are counted exactly, evasions are seen.

Each evasion is a test that says what this tier makes of it. Where a kernel has no cgroup v2 or refuses BPF, the fixture
fails: there is no silent skip.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloister.audit import calls
from cloister.errors import StepError
from cloister.host import kernel_programs
from cloister.host.audit_log import Log
from cloister.runs import kernel_tiers
from cloister.runs.audit_keeper import Keeper, Rules
from cloister.runs.audit_verify import verify as verify_log
from cloister.services.kernel_source import Source
from cloister.services.sensor import Sensor
from support.sensor_rig import SensorRig, evade, sensor_rig

pytestmark = [pytest.mark.kernel, pytest.mark.root]


@pytest.fixture(scope="module")
def rig() -> Iterator[SensorRig]:
    """A sensor that records what matters of system calls."""
    with sensor_rig() as one:
        yield one


@pytest.fixture
def flooded() -> Iterator[SensorRig]:
    """A sensor of its own: its log grows large."""
    with sensor_rig() as one:
        yield one


@pytest.fixture(scope="module")
def evader(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The program of evasions."""
    return evade(tmp_path_factory.mktemp("evade"))


def of(rig: SensorRig, run: str, *kinds: str) -> list[dict[str, Any]]:
    """Return the events of one run."""
    return [one for one in rig.lines(*kinds) if one.get("run") == run]


def opened(rig: SensorRig, run: str) -> dict[str, dict[str, Any]]:
    """Return files that were opened, by path."""
    return {one["file"]["path"]: one for one in of(rig, run, "file.opened")}


def test_processes_are_known_with_parent_words_and_end(rig: SensorRig) -> None:
    """What is launched, forked and ended stands in the log, each process linked to its parent, with argv and cwd."""
    path = rig.cgroup("processes", run="r-processes", agent="pi", user="alice")
    rig.run(path, ["sh", "-c", "cd /usr; (exit 3); /bin/echo 'a\nb' \"$(printf '\\377')\" >/dev/null; kill -9 $$"])
    events = of(rig, "r-processes", "process.executed", "process.forked", "process.exited")

    echo = next(one for one in events if one["process"].get("cmd_line", [""])[0] == "/bin/echo")
    assert echo["process"]["cmd_line"] == ["/bin/echo", "a\nb", "\\xff"]
    assert echo["process"]["cwd"] == "/usr"
    assert echo["process"]["path"] in {"/usr/bin/echo", "/bin/echo"}
    assert (echo["agent"], echo["user"]) == ("pi", "alice")
    made = {one["process"]["uid"]: one for one in events if one["kind"] == "process.forked"}
    assert echo["process"]["parent_uid"] == made[echo["process"]["uid"]]["process"]["parent_uid"]
    ends = [one["details"] for one in events if one["kind"] == "process.exited"]
    assert {"code": 3} in ends
    assert {"code": 0, "signal": 9} in ends


def test_a_process_whose_first_thread_ended_is_not_over(rig: SensorRig, evader: str) -> None:
    """A process ends with its last thread, whose status it has; the end of its first thread is not taken for it."""
    path = rig.cgroup("leader", run="r-leader")
    rig.run(path, [evader, "leader-ends-first"])
    ends = of(rig, "r-leader", "process.exited")

    assert [one["details"]["code"] for one in ends] == [7]


def test_connections_are_seen_below_the_proxy(rig: SensorRig) -> None:
    """Connect, datagrams and bind of both families are events, with the address that the kernel used."""
    path = rig.cgroup("network", run="r-network")
    script = (
        "import socket as s\n"
        "s.socket().connect_ex(('127.0.0.1', 9))\n"
        "s.socket(s.AF_INET6).connect_ex(('::1', 9))\n"
        "s.socket(s.AF_INET, s.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))\n"
        "s.socket(s.AF_INET6, s.SOCK_DGRAM).sendto(b'x', ('::1', 9))\n"
        "s.socket().bind(('127.0.0.1', 0))\n"
        "s.socket(s.AF_UNIX).connect_ex('/nowhere.sock')\n"
        "s.socket(s.AF_UNIX).connect_ex('\\0abstract')\n"
    )
    rig.run(path, ["/usr/bin/python3", "-c", script])
    events = of(rig, "r-network", "network.connected", "network.sent", "network.bound")
    seen = [(one["kind"].removeprefix("network."), one["endpoint"]) for one in events]

    assert ("connected", {"ip": "127.0.0.1", "port": 9, "protocol": "tcp"}) in seen
    assert ("connected", {"ip": "::1", "port": 9, "protocol": "tcp"}) in seen
    assert ("sent", {"ip": "127.0.0.1", "port": 9, "protocol": "udp"}) in seen
    assert ("sent", {"ip": "::1", "port": 9, "protocol": "udp"}) in seen
    assert ("bound", {"ip": "127.0.0.1", "protocol": "tcp"}) in seen
    assert ("connected", {"path": "/nowhere.sock", "protocol": "unix"}) in seen
    assert ("connected", {"path": "@abstract", "protocol": "unix"}) in seen


def test_who_is_not_watched_is_not_recorded(rig: SensorRig) -> None:
    """Only watched cgroups are recorded, with what is below them; their neighbours are not."""
    rig.cgroup("watched", run="r-watched")
    other = rig.cgroup("unwatched")
    os.mkdir(f"{rig.cgroups[-2]}/deeper")
    rig.run(other, ["/bin/true", "unseen"])
    rig.run(f"{rig.cgroups[-2]}/deeper", ["/bin/true", "seen"])
    os.rmdir(f"{rig.cgroups[-2]}/deeper")
    words = [one["process"].get("cmd_line", []) for one in rig.lines("process.executed")]

    assert ["/bin/true", "seen"] in words
    assert ["/bin/true", "unseen"] not in words


def test_files_are_told_by_the_kernels_own_path(rig: SensorRig, evader: str) -> None:
    """An opened file's path is the kernel's: absolute, whatever the call said; failed calls tell what was asked for."""
    path = rig.cgroup("files", run="r-files")
    rig.run(path, [evader, "relative"])
    rig.run(path, ["sh", "-c", "cd /tmp; : >cloister-x; mv cloister-x cloister-y; rm cloister-y; cat nowhere"])
    files = opened(rig, "r-files")

    assert files["/etc/services"]["file"]["resolved"]
    assert files["/tmp/nowhere"]["error"] == 2
    assert "resolved" not in files["/tmp/nowhere"]["file"]
    renamed = of(rig, "r-files", "file.renamed")[0]["file"]
    assert (renamed["path"], renamed["target"]) == ("/tmp/cloister-x", "cloister-y")
    assert "/tmp/cloister-y" in [one["file"]["path"] for one in of(rig, "r-files", "file.deleted")]


def test_a_path_on_a_page_that_is_not_there_is_read_at_the_end(rig: SensorRig, evader: str) -> None:
    """An attacker who names a file on a page that is not mapped yet is seen: the text is read when the call returns."""
    path = rig.cgroup("unmapped", run="r-unmapped")
    rig.run(path, [evader, "unmapped"])

    assert opened(rig, "r-unmapped")["/etc/shells"]["details"]["late"]


def test_a_text_that_changes_during_the_call_is_marked(rig: SensorRig, evader: str) -> None:
    """A race for the text is won by nobody: the path of what was opened is the kernel's, changed texts are marked."""
    path = rig.cgroup("race", run="r-race")
    won = int(rig.run(path, [evader, "race"]).split()[-1])
    told = [one for one in of(rig, "r-race", "file.opened") if one["file"].get("flags", 0) & 0o1000000]

    assert sum(one["file"]["path"] == "/etc/passwd" for one in told) == won
    assert all(one["file"]["resolved"] for one in told if not one.get("error"))


def test_io_uring_is_seen_though_not_its_path(rig: SensorRig, evader: str) -> None:
    """What io_uring opens has no path in this tier: its set-up and each operation are events, and the tier says so."""
    path = rig.cgroup("ring", run="r-ring")
    assert int(rig.run(path, [evader, "ring"]).split()[-1]) >= 0
    invoked = [one["details"] for one in of(rig, "r-ring", "kernel.invoked")]

    assert "io_uring_setup" in [one.get("call") for one in invoked]
    assert {"act": "io_uring", "opcode": 18} in invoked
    assert "/etc/group" not in opened(rig, "r-ring")
    assert "io_uring" in rig.lines("log.tier")[0]["message"]


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="int 0x80 is x86's")
def test_calls_by_another_table_are_not_mistaken(rig: SensorRig, evader: str) -> None:
    """Calls by int 0x80 have numbers of their own: getpid there is told as such, never as writev, which is 20 here."""
    path = rig.cgroup("table", run="r-table")
    rig.run(path, [evader, "other-table"])
    rig.end_cgroups()
    compat = [one for one in of(rig, "r-table", "kernel.invoked") if one["details"].get("compat")]

    assert compat[0]["details"]["a5"] == 20
    assert compat[0]["severity_id"] == 3
    counted = of(rig, "r-table", "kernel.counted")[0]["details"]
    assert counted["call_compat"] == 1
    assert counted.get("call_writev", 0) == 0


def test_privileges_namespaces_and_tracing_are_events(rig: SensorRig) -> None:
    """What changes rights or looks into others is told with its call: unshare, mount, setuid, ptrace, bpf."""
    path = rig.cgroup("rights", run="r-rights")
    script = (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\nlibc.ptrace(0, 0, 0, 0)\nlibc.syscall(321, 0, 0, 0)\n"
        "os.setuid(4242)\n"
    )
    rig.run(path, ["/usr/bin/python3", "-c", script])
    rig.run(path, ["unshare", "--mount", "true"])
    calls = {one["details"]["call"]: one for one in of(rig, "r-rights") if "call" in one.get("details", {})}

    assert calls["setuid"]["kind"] == "process.uid-changed"
    assert calls["ptrace"]["severity_id"] == 3
    assert calls["unshare"]["details"]["a0"] == 0x20000
    assert calls["mount"]["file"]["path"] == "/"
    assert "bpf" in calls


def test_counts_of_calls_are_complete(rig: SensorRig, evader: str) -> None:
    """Every system call is counted: the counter of one is exactly what was made, whatever became of its events."""
    path = rig.cgroup("counts", run="r-counts")
    base = rig.cgroup("base", run="r-base")
    rig.run(path, [evader, "flood=5000"])
    rig.run(base, [evader, "flood=0"])
    rig.end_cgroups()
    many = of(rig, "r-counts", "kernel.counted")[0]["details"]["call_openat"]
    few = of(rig, "r-base", "kernel.counted")[0]["details"]["call_openat"]

    assert many - few == 5000


NOT_TRIED = {
    "exit", "exit_group", "rt_sigreturn", "pause",  # do not return
    "fork", "vfork",  # return twice
    "sync", "vhangup", "msgget",  # reach beyond the process
}  # fmt: skip


def test_all_records_each_call_as_often_as_it_was_made(rig: SensorRig) -> None:
    """With `all`, each system call there is leaves its events, as many as were counted; else it is counted only."""
    named = calls.numbers(os.uname().machine)
    tried = {name: number for name, number in named.items() if name not in NOT_TRIED}
    script = (
        "import ctypes, sys\ncall = ctypes.CDLL(None).syscall\nnone = [ctypes.c_long(-1)] * 6\n"
        "for number in sys.argv[1:]:\n    call(ctypes.c_long(int(number)), *none)\n"
        f"for _ in range(500):\n    call(ctypes.c_long({named['getppid']}))\n"
    )
    # Arguments that nothing can be done with, and nobody who might.
    nobody = ["setpriv", "--reuid=4242", "--regid=4242", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all"]
    command = [*nobody, "/usr/bin/python3", "-ISc", script, *map(str, tried.values())]
    with sensor_rig("--calls", "all") as everything:
        everything.run(everything.cgroup("all", run="r-all"), command)
        everything.end_cgroups()
        counted = of(everything, "r-all", "kernel.counted")[0]["details"]
        lost = of(everything, "r-all", "log.lost")
        events = Counter(one["details"]["call"] for one in of(everything, "r-all") if "call" in one.get("details", {}))
    rig.run(rig.cgroup("not-all", run="r-not-all"), command)
    rig.end_cgroups()
    fewer = {one["details"].get("call") for one in of(rig, "r-not-all") if "details" in one}

    made = {name.removeprefix("call_"): count for name, count in counted.items() if name.startswith("call_")}
    assert not lost
    assert made.keys() >= tried.keys()
    assert made["getppid"] >= 501
    assert sum(made.values()) == counted["total"]
    unended = {"exit", "exit_group"}  # these end a process, and are events of that kind
    assert events == {name: count for name, count in made.items() if name not in unended}
    assert "getppid" not in fewer
    assert "ptrace" in fewer
    assert of(rig, "r-not-all", "kernel.counted")[0]["details"]["call_getppid"] == made["getppid"]


@pytest.mark.parametrize("many", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_flood_is_counted_exactly_and_blinds_nobody(flooded: SensorRig, evader: str, many: int) -> None:
    """Delivered and lost events are exactly the kernel's count; another agent's events all arrive meanwhile."""
    rig = flooded
    flooder = rig.cgroup("flood", run="r-flood")
    quiet = rig.cgroup("quiet", run="r-quiet")
    flood = rig.start(flooder, [evader, f"flood={many}"])
    seen = 0
    while flood.poll() is None:
        rig.turn(0.05)
        rig.run(quiet, ["/bin/true", str(seen)])
        seen += 1
    assert flood.stdout
    flood.stdout.close()
    rig.end_cgroups()
    counted = of(rig, "r-flood", "kernel.counted")[0]["details"]
    lost = of(rig, "r-flood", "log.lost")
    delivered = [one for one in of(rig, "r-flood") if one.get("tier")]

    missing = sum(one["details"]["dropped"] + one["details"]["limited"] for one in lost)
    assert len(delivered) + missing == counted["events_bulk"] + counted["events_critical"]
    bulk = [one for one in delivered if one["kind"] == "file.opened"]
    assert len(bulk) + missing == counted["call_openat"]
    words = [
        one["process"]["cmd_line"] for one in of(rig, "r-quiet", "process.executed") if "cmd_line" in one["process"]
    ]
    assert all(["/bin/true", str(number)] in words for number in range(seen))
    assert not of(rig, "r-quiet", "log.lost")


def test_what_happens_while_no_keeper_reads_waits(rig: SensorRig) -> None:
    """A keeper that restarts loses nothing that the rings hold, also of runs that began and ended meanwhile."""
    rig.turn(0.1)
    rig.close_keeper()
    path = rig.cgroup("between", run="r-between")
    rig.run(path, ["/bin/true", "between"])
    SensorRig._wait(lambda: SensorRig._removed(path))
    rig.cgroups.remove(path)
    time.sleep(1.3)
    rig.open_keeper()
    rig.turn(0.3)
    words = [one["process"].get("cmd_line") for one in of(rig, "r-between", "process.executed")]

    assert ["/bin/true", "between"] in words
    assert of(rig, "r-between", "kernel.counted")


def test_the_log_verifies_with_lines_of_c(rig: SensorRig) -> None:
    """Lines that C chained and lines that Python chained are one chain, by the verifier of the log."""
    path = rig.cgroup("chain", run="r-chain")
    rig.run(path, ["/bin/true"])
    rig.turn()
    rig.keeper.head("test")
    report = verify_log(str(rig.folder / "log"))

    assert not report.findings


def test_pid_namespaces_are_watched_for_their_owner(rig: SensorRig) -> None:
    """A run without a cgroup of its own is watched by its pid namespace, with what nests in it."""
    inner = subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "sh", "-c",
         "read go; /bin/true in-namespace; unshare --pid --fork /bin/true nested"],
        stdin=subprocess.PIPE, text=True,
    )  # fmt: skip
    child = f"/proc/{inner.pid}/task/{inner.pid}/children"
    SensorRig._wait(lambda: bool(Path(child).read_text().split()))
    first = Path(child).read_text().split()[0]
    asked = rig.watch(f"/proc/{first}/ns/pid", run="r-namespace")
    inner.communicate("go\n", timeout=20)
    words = [one["process"].get("cmd_line") for one in of(rig, "r-namespace", "process.executed")]
    asked.close()

    assert ["/bin/true", "in-namespace"] in words
    assert ["/bin/true", "nested"] in words


def test_strangers_get_neither_rings_nor_watches(rig: SensorRig) -> None:
    """An ordinary user gets no ring, and no watch of a cgroup or of the system's pid namespace."""
    script = (
        "import os, socket, sys, msgspec\n"
        "from cloister.errors import StepError\n"
        "from cloister.host import sensor_ask\n"
        "from cloister.host.frames import *\n"
        "os.setgroups([]); os.setresgid(4242, 4242, 4242); os.setresuid(4242, 4242, 4242)\n"
        "for path in sys.argv[2:]:\n"
        "    try:\n"
        "        sensor_ask.ask(os.open(path, os.O_RDONLY), {'run': 'x'}, sys.argv[1])\n"
        "        print('granted')\n"
        "    except StepError:\n"
        "        print('refused')\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.sendall(encode('R')); print(len(s.recv(10)))\n"
    )
    path = rig.cgroup("stranger")
    os.chmod(rig.folder, 0o755)  # noqa: S103  # strangers must get as far as the socket
    os.chmod(rig.socket, 0o666)  # noqa: S103  # as systemd makes it

    # It becomes a stranger after its imports: these files are in a folder of another's.
    done = subprocess.run(
        [sys.executable, "-c", script, rig.socket, path, "/proc/self/ns/pid", "/etc"], capture_output=True, text=True,
        timeout=20, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=False,
    )  # fmt: skip

    assert done.stdout.split() == ["refused", "refused", "refused", "0"], done.stderr


CAPABILITIES = ("bpf", "perfmon", "net_admin")


@pytest.mark.parametrize("less", ["", *CAPABILITIES])
def test_the_sensors_capabilities_are_exactly_those_needed(less: str) -> None:
    """With three capabilities all programs load; with one less, something does not."""
    # The last one only because this folder is another's: where Cloister is installed, everybody may read.
    kept = ",".join(["-all", "+dac_read_search", *(f"+{one}" for one in CAPABILITIES if one != less)])
    prefix = ("setpriv", f"--bounding-set={kept}", f"--inh-caps={kept}")
    with contextlib.suppress(AssertionError), sensor_rig(prefix=prefix) as one:
        heads = one.source.heads()
        tiers = [heads.get(f"tier_{area}") for area in kernel_tiers.AREAS]
        whole = tiers == ["tracepoint", "cgroup", "tracepoint", "tracepoint", "tracepoint"]
        assert whole == (not less), tiers
        return
    assert less


def test_a_program_that_is_refused_takes_none_with_it() -> None:
    """Programs are loaded one by one where their object fails as a whole: the refused one is named, the rest runs."""
    with kernel_programs.Programs() as programs:
        outcomes = {one.program: one.why_not for one in programs.load("rings")}

        assert sorted(outcomes) == ["rings_submit", "rings_submit_before_6_4"]
        assert [bool(why) for why in outcomes.values()].count(False) == 1
        assert len(programs.attached) == 1


def test_programs_that_the_kernel_left_out_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How often the kernel left a program out is an event, once per increase, and in heads; each keeper hears it."""
    with kernel_programs.Programs() as programs, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sensor.sock"))
        listener.listen()
        sensor = Sensor(listener, programs, frozenset({0}), "security")
        assert programs.misses() >= 0
        keeper = Keeper(Log(str(tmp_path / "log")), str(tmp_path / "keys"), Rules())
        keeper.open()
        for told in ((0, 7, 7, 9), (9,)):  # the second keeper comes later, and is told all of it
            source = Source(keeper, str(tmp_path / "sensor.sock"))
            source.turn()
            sensor._accept()
            sensor._hear(next(one.data for one in sensor._selector.get_map().values()))
            for misses in told:
                monkeypatch.setattr(programs, "misses", lambda misses=misses: misses)
                sensor._tick()
                source.turn()
                assert source.heads()["kernel_left_out"] == misses
            source.close()
            sensor._drop(next(one.data for one in sensor._selector.get_map().values()))
        keeper.close()
        lines = [json.loads(line) for path in (tmp_path / "log").glob("*.jsonl") for line in path.open("rb")]
        lost = [one for one in lines if one["kind"] == "log.lost"]

    assert [one["details"] for one in lost] == [
        {"left_out": 7, "total": 7}, {"left_out": 2, "total": 9}, {"left_out": 9, "total": 9},
    ]  # fmt: skip
    assert {one["reason"] for one in lost} == {"kernel-program-left-out"}


def test_no_group_is_no_surprise() -> None:
    """A group that this installation has not is an error that says so."""
    with kernel_programs.Programs() as programs, pytest.raises(StepError):
        programs.load("nothing")
