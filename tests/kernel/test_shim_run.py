"""The shim starts, watches and ends one run: codes, bytes, descriptors, signals, the self-probe."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from shim_rig import SECCOMP_ALLOW, Rig, Run, family, rig_of_test, wait_gone

pytestmark = pytest.mark.kernel
rig = pytest.fixture(rig_of_test)


def test_every_exit_code_comes_through(rig: Rig) -> None:
    """The command's own status, 0 to 255, is the exit code of the run."""
    for code in range(256):
        assert Run(rig, listen=False).complete("sh", "-c", f"exit {code}")[0] == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGHUP, signal.SIGPIPE])
def test_death_by_a_signal_is_128_plus_n(rig: Rig, number: int) -> None:
    """A command that dies of a signal ends the run with 128 plus its number."""
    assert Run(rig).complete("sh", "-c", f"kill -{int(number)} $$")[0] == 128 + number


def test_what_cannot_be_started_is_127_126_or_125(rig: Rig) -> None:
    """127 not found, 126 not executable, 125 when we could not even get there."""
    assert Run(rig).complete("no-such-command")[0] == 127
    assert Run(rig).complete("/no/such/command")[0] == 127
    assert Run(rig).complete("/etc/passwd")[0] == 126
    assert Run(rig).complete("/usr")[0] == 126
    assert Run(rig).complete("true", cwd="/no/such/directory")[0] == 125
    assert Run(rig).complete("true")[0] == 0


def test_the_search_path_is_the_agents(rig: Rig) -> None:
    """A bare name is looked up on the agent's PATH, passing over what is not executable, as execvp(3)."""
    (rig.work / "good").mkdir()
    (rig.work / "bad").mkdir()
    (rig.work / "bad/tool").write_text("not for you")
    (rig.work / "good/tool").write_text("#!/bin/sh\necho found\n")
    (rig.work / "good/tool").chmod(0o755)
    path = f"PATH={rig.work}/none:{rig.work}/bad:{rig.work}/good".encode()
    assert Run(rig).complete("tool", environment=[path]) == (0, b"found\n", b"")
    assert Run(rig).complete("tool", environment=[f"PATH={rig.work}/bad".encode()])[0] == 126
    assert Run(rig).complete("sh", "-c", "echo ok", environment=[]) == (0, b"ok\n", b"")


def test_fifty_megabytes_pass_unchanged(rig: Rig) -> None:
    """Stdin and stdout are binary-safe, whatever the bytes and however many."""
    data = os.urandom(1 << 20) * 50
    run = Run(rig, stdin=subprocess.PIPE)
    run.go("cat")
    received: list[bytes] = []
    reading = threading.Thread(target=lambda: received.append(run.process.stdout.read()))
    feeding = threading.Thread(target=lambda: (run.process.stdin.write(data), run.process.stdin.close()))
    reading.start()
    feeding.start()
    assert run.wait(30) == 0
    feeding.join(5)
    reading.join(5)
    run.close()
    assert hashlib.sha256(received[0]).digest() == hashlib.sha256(data).digest()


def test_the_agent_has_three_descriptors(rig: Rig, tmp_path: Path) -> None:
    """Neither our channels nor what the caller left open reaches the agent; stdio does."""
    secret = (tmp_path / "secret").open("w")
    os.set_inheritable(secret.fileno(), True)
    run = Run(rig, inherited=[secret.fileno()])
    code, out, _ = run.complete("/usr/bin/python3", "-c", "import os; print(sorted(os.listdir('/proc/self/fd'))[:-1])")
    secret.close()
    assert (code, out) == (0, b"['0', '1', '2']\n")


def test_the_environment_is_the_one_of_go(rig: Rig) -> None:
    """The agent sees the variables of `G` and no other; PID 1 and bubblewrap have none at all."""
    run = Run(rig, env={"SECRET": "canary"})
    run.go("sh", "-c", "env; sleep 5", environment=[b"PATH=/usr/bin", b"ODD=a=b c\xff"])
    run.until("inner", "R")
    time.sleep(0.1)
    members = family(run.process.pid)
    seen = []
    for pid in members.keys() - {run.process.pid}:
        with contextlib.suppress(PermissionError):  # PID 1, when we are not root
            seen.append(Path(f"/proc/{pid}/environ").read_bytes())
    assert len(seen) >= 3
    assert not any(b"canary" in text for text in seen)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 143
    assert set(run.process.stdout.read().splitlines()) >= {b"ODD=a=b c\xff", b"PATH=/usr/bin"}
    run.close()


def test_pid_one_is_closed_to_the_agent(rig: Rig) -> None:
    """The agent has PID 1's uid and still cannot read its memory, descriptors or environment."""
    script = "cat /proc/1/environ; ls /proc/1/fd; head -c1 /proc/1/mem; cat /proc/self/environ >/dev/null && echo own"
    code, out, _ = Run(rig).complete("sh", "-c", script)
    assert (code, out) == (0, b"own\n")


def test_no_go_no_agent(rig: Rig) -> None:
    """When the channel ends before `G`, nothing runs and nothing is left: EOF is not go."""
    marker = rig.work / "ran"
    run = Run(rig)
    time.sleep(0.1)
    members = family(run.process.pid)
    run.inner.close()
    run._on_closed("inner")
    assert run.wait() == 125
    assert not marker.exists()
    assert not wait_gone(members)


def test_a_writable_probe_path_stops_the_run(rig: Rig) -> None:
    """Attack: a wall that does not stand. The agent must not run, and the probe leaves no file behind."""
    for path in (rig.work, rig.work / "new"):
        run = Run(rig, options=["--probe-write", str(path)])
        assert run.complete("touch", str(rig.work / "ran"))[0] == 125
        assert f"write:{path}=allowed" in run.probe
        assert run.probe[-1] == "verdict=failed"
        assert not any(rig.work.iterdir())
    existing = rig.work / "existing"
    existing.write_text("kept")
    existing.chmod(0o666)
    assert Run(rig, options=["--probe-write", str(existing)]).complete("true")[0] == 125
    assert existing.read_text() == "kept"
    assert Run(rig).complete("true")[0] == 0


def test_a_reachable_network_stops_the_run(rig: Rig) -> None:
    """Attack: the sandbox shares the host's network. A connect that is not refused means no agent."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        run = Run(rig, options=["--probe-connect", address], bwrap=["--share-net"], listen=False)
        assert run.complete("true")[0] == 125
        assert f"connect:{address}=allowed" in run.probe
        run = Run(rig, options=["--probe-connect", address], listen=False)
        assert run.complete("true")[0] == 0
        assert f"connect:{address}=denied" in run.probe


def test_a_missing_filter_stops_the_run(rig: Rig) -> None:
    """Attack: no seccomp filter. User namespaces then work, and the agent must not run."""
    run = Run(rig, seccomp=False)
    assert run.complete("true")[0] == 125
    assert {"seccomp=0", "userns=allowed", "verdict=failed"} <= set(run.probe)


def test_a_silent_relay_stops_the_run(rig: Rig) -> None:
    """The one connect that must work is tried too: without a relay the run ends with 125."""
    rig.relay.path.unlink()
    run = Run(rig)
    assert run.complete("true")[0] == 125
    assert "egress=ENOENT" in run.probe


def test_nested_is_a_named_exception(rig: Rig) -> None:
    """With --nested user namespaces may be made; without it they stop the run; a filter is always needed."""
    run = Run(rig, filter_text=SECCOMP_ALLOW, options=["--nested"])
    assert run.complete("unshare", "-U", "true")[0] == 0
    assert {"userns=allowed", "seccomp=2", "verdict=passed"} <= set(run.probe)
    run = Run(rig, filter_text=SECCOMP_ALLOW)
    assert run.complete("true")[0] == 125
    assert {"userns=allowed", "seccomp=2", "verdict=failed"} <= set(run.probe)
    assert Run(rig, seccomp=False, options=["--nested"]).complete("true")[0] == 125


def test_inner_runs_as_pid_one_only(rig: Rig) -> None:
    """The end of PID 1 is what ends everything, so the inner half refuses another place."""
    argv = ["/usr/bin/bwrap", "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "--seccomp"]
    argv += ["4", "--", str(rig.shim), "inner", "--ctl", "3", "--egress", str(rig.relay.path)]
    run = Run(rig, argv=argv)
    assert run.complete("true")[0] == 125
    assert "pid=2" in run.probe


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_the_agent(rig: Rig, number: int) -> None:
    """A signal to `cloister run` is the agent's to handle; by default it dies of it: 128+n."""
    run = Run(rig)
    run.go("sleep", "60")
    run.until("inner", "R")
    run.process.send_signal(number)
    assert run.wait() == 128 + number
    run.close()


def test_an_agent_may_handle_a_signal_again_and_again(rig: Rig) -> None:
    """The third SIGINT is passed on like the first; nothing of ours gives up earlier."""
    run = Run(rig)
    script = "n=0; trap 'n=$((n+1)); echo $n; [ $n = 3 ] && exit 9' INT; echo up; while :; do sleep 0.05; done"
    run.go("sh", "-c", script)
    for expected in (b"up\n", b"1\n", b"2\n", b"3\n"):
        while run.process.stdout.peek(1)[:1] == b"":
            run.turn()
        assert run.process.stdout.readline() == expected
        run.process.send_signal(signal.SIGINT)
        for _ in range(5):
            run.turn(0.02)
    assert run.wait() == 9
    run.close()


def test_a_signal_before_the_launch_ends_the_wait(rig: Rig) -> None:
    """Nothing runs yet, so Ctrl-C leaves at once, with 130."""
    run = Run(rig, launch=False)
    time.sleep(0.1)
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(5) == 130
    run.close()


def test_stop_and_continue_without_a_terminal(rig: Rig) -> None:
    """SIGTSTP stops the agent and then ourselves; SIGCONT lets both go on."""
    run = Run(rig)
    run.go("sh", "-c", "sleep 0.3; exit 5")
    inside = run.until("inner", "R")
    assert inside
    run.process.send_signal(signal.SIGTSTP)
    pid, status = os.waitpid(run.process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    run.until("outer", "S")
    time.sleep(0.5)
    run.turn()
    agents = [p for p in family(pid) if Path(f"/proc/{p}/stat").read_text().rpartition(")")[2].split()[0] == "T"]
    assert len(agents) >= 2
    assert run.status is None
    run.process.send_signal(signal.SIGCONT)
    assert run.wait() == 5
    assert not [seen for seen in run.seen if seen[1] == "Z"]
    run.close()


def test_limits_are_the_agents(rig: Rig) -> None:
    """--rlimit holds for the agent; what we raise for ourselves does not; core dumps are off."""
    script = "ulimit -Sn; ulimit -Hn; ulimit -Sf; ulimit -Hc"
    plain = subprocess.run(["sh", "-c", "ulimit -Sn; ulimit -Hn"], capture_output=True, check=True).stdout
    code, out, _ = Run(rig).complete("sh", "-c", script)
    assert (code, out) == (0, plain + b"unlimited\n0\n")
    options = ["--rlimit", "nofile=64", "--rlimit", "fsize=1048576"]
    assert Run(rig, options=options).complete("sh", "-c", script)[1] == b"64\n64\n2048\n0\n"


def test_write_execute_memory_can_be_refused(rig: Rig) -> None:
    """--mdwe refuses memory that is writable and executable; without it such memory can be had."""
    script = "import mmap; mmap.mmap(-1, 4096, prot=7); print('mapped')"
    assert Run(rig).complete("/usr/bin/python3", "-c", script)[:2] == (0, b"mapped\n")
    assert Run(rig, options=["--mdwe"]).complete("/usr/bin/python3", "-c", script)[0] == 1


def test_exec_runs_in_the_same_sandbox(rig: Rig) -> None:
    """A second command gets its own stdio and status, and the same walls; the agent goes on."""
    run = Run(rig)
    run.go("sleep", "60")
    run.until("inner", "R")
    reading, writing = os.pipe()
    with Path(os.devnull).open("rb") as null:
        run.execute(7, [null.fileno(), writing, writing], "sh", "-c", "ls /proc/self/fd; touch /usr/x; exit 3")
    os.close(writing)
    assert run.until("inner", "R")[:4] == b"\x07\0\0\0"
    assert run.until("inner", "E") == b"\x07\0\0\0\x03"
    text = os.read(reading, 4096)
    os.close(reading)
    assert text.startswith(b"0\n1\n2\n3\n")
    assert b"Read-only file system" in text
    assert run.status is None
    run.process.terminate()
    assert run.wait() == 143
    run.close()


def test_an_exec_that_cannot_start_is_reported(rig: Rig) -> None:
    """A missing command of `exec` is told apart, and neither the agent nor PID 1 notices."""
    run = Run(rig)
    run.go("sleep", "60")
    run.until("inner", "R")
    with Path(os.devnull).open("r+b") as null:
        run.execute(2, [null.fileno()] * 3, "no-such-command")
        assert run.until("inner", "Y") == b"\x02\0\0\0\x02\0\0\0exec"
        run.execute(3, [null.fileno()] * 3, "sleep", "60")
        run.until("inner", "R")
        run.inner.send("S", bytes([signal.SIGTERM]) + b"\x03\0\0\0")
        assert run.until("inner", "E") == b"\x03\0\0\0\x8f"
    run.process.terminate()
    assert run.wait() == 143
    run.close()


def every_stat() -> list[str]:
    """Return the stat line of every process of the host, zombies included."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            lines.append(path.read_text())
    return lines


def test_orphans_are_reaped_and_die_with_the_run(rig: Rig) -> None:
    """A double fork outlives its parent, not the run; what ended is reaped meanwhile."""
    run = Run(rig)
    script = "(setsid sleep 300 &) ; for i in 1 2 3 4 5; do (true &) ; done; sleep 0.5; exit 4"
    run.go("sh", "-c", script)
    run.until("inner", "R")
    time.sleep(0.3)
    members = family(run.process.pid)
    names = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in members]
    assert b"sleep\x00300\x00" in names
    fields = [line.rpartition(")")[2].split() for line in every_stat()]
    assert not [pid for state, pid in (line[:2] for line in fields) if state == "Z" and int(pid) in members]
    assert run.wait() == 4
    run.close()
    assert not wait_gone(members)


def test_the_text_of_the_end_cannot_command_the_terminal(rig: Rig) -> None:
    """What the broker says last may quote the agent: escape sequences are made harmless, letters are kept."""
    run = Run(rig, launch=False)
    run.outer.send("F", b"\x4dcloister: d\xc3\xa9j\xc3\xa0 \x1b]52;c;aGk=\x07 \xc2\x9b31m\nend")
    assert run.process.wait(5) == 77
    assert run.process.stderr.read() == b"cloister: d\xc3\xa9j\xc3\xa0 ?]52;c;aGk=? ?31m\nend\n"
    run.close()


def test_stdio_may_be_closed(rig: Rig) -> None:
    """A caller that closed its stdio gets /dev/null there, never one of our descriptors."""
    run = Run(rig, preexec_fn=lambda: [os.close(fd) for fd in (0, 1, 2)])
    run.go("sh", "-c", 'for f in 0 1 2; do [ "$(readlink /proc/$$/fd/$f)" = /dev/null ] || exit 9; done; exit 6')
    assert run.wait() == 6
    run.close()
