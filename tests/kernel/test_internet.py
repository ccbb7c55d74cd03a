"""Mode `internet` against a made-up internet: public addresses work, nothing else does, nothing stays."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import far_side, world
from support.cloister import descendants, wait_for
from support.world import World, WorldUser

pytestmark = [pytest.mark.kernel, pytest.mark.root]

POLICY = """\
schema = 1

[agents.shell]
preset = "shell"
environment_audit = false
egress = { mode = "internet" }

[agents.lifted]
preset = "shell"
environment_audit = false
egress = { mode = "internet", private = ["10.1.2.0/24"], deny = ["93.184.216.34:80"] }
"""
REFUSED = (
    far_side.PRIVATE[0], "10.255.255.1", "100.64.0.1", "169.254.169.254", "192.0.2.1", world.HOST[0], world.GATEWAY[0],
    "::ffff:10.1.2.3", far_side.PRIVATE[1], "2001:db8::1", "2002:a01:203::1", "64:ff9b::a01:203",
    "2606:4700::5efe:a01:203", world.HOST[1], world.GATEWAY[1], world.NEIGHBOUR,
)  # fmt: skip
CLIENT = """
import json, socket, time
def attempt(kind, host, port):
    began = time.monotonic()
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)[0]
        with socket.socket(found[0], found[1]) as made:
            made.settimeout(3)
            if kind == "tcp":
                made.connect(found[4])
            else:
                made.sendto(b"x", found[4])
            answer = made.recv(99).decode().strip()
    except OSError as error:
        answer = type(error).__name__
    return answer, time.monotonic() - began
"""


@pytest.fixture(scope="module")
def internet() -> Iterator[World]:
    """One made-up internet for all tests of this file."""
    made = World()
    yield made
    made.close()


@pytest.fixture
def someone(internet: World) -> Iterator[WorldUser]:
    """An ordinary user there; after the test nothing of theirs may be left."""
    user = WorldUser(internet, POLICY)
    yield user
    user.close()
    assert _settled(user) == []


def _processes(user: WorldUser) -> list[str]:
    """Return the command lines of all processes of the user."""
    done = subprocess.run(["ps", "-U", str(user.uid), "-o", "args="], capture_output=True, text=True, check=False)
    return [line for line in done.stdout.splitlines() if "pasta" in line or "cloister" in line]


def _settled(user: WorldUser, patience_s: float = 5) -> list[str]:
    """Return what is left of the user's processes when dying ones had time to die."""
    until = time.monotonic() + patience_s
    while (left := _processes(user)) and time.monotonic() < until:
        time.sleep(0.05)
    return left


def _attempts(
    user: WorldUser, places: list[tuple[str, str, int]], agent: str = "shell"
) -> dict[str, tuple[str, float]]:
    """Try places from inside one run; return answer and seconds by `kind host`."""
    script = f"{CLIENT}\nprint(json.dumps({{f'{{p[0]}} {{p[1]}}': attempt(*p) for p in {places!r}}}))"
    done = user.python(script, agent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_public_addresses_are_reached_directly(someone: WorldUser) -> None:
    """TCP and UDP reach public addresses over IPv4 and IPv6, without the proxy."""
    places = [("tcp", host, far_side.HTTP_PORT) for host in far_side.PUBLIC]
    places += [("udp", host, far_side.ECHO_PORT) for host in far_side.PUBLIC]
    answers = _attempts(someone, places)

    assert {place: answer for place, (answer, _) in answers.items()} == {place: place for place in answers}


def test_names_resolve_by_the_hosts_resolver(someone: WorldUser, internet: World) -> None:
    """A program that resolves by itself gets an answer, and a name of the LAN leads nowhere."""
    answers = _attempts(someone, [("tcp", "www.example.org", 80), ("tcp", "nas.lan.example", 80)])

    assert answers["tcp www.example.org"][0] in {f"tcp {host}" for host in far_side.PUBLIC}
    assert answers["tcp nas.lan.example"][0] == "ConnectionRefusedError"
    assert f"dns {world.RESOLVER}" in internet.arrived()


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_everything_else_is_refused_at_once(someone: WorldUser, internet: World, kind: str) -> None:
    """Private, metadata, translated and neighbouring addresses and the host: an error within a second, no packet."""
    port = far_side.HTTP_PORT if kind == "tcp" else far_side.ECHO_PORT
    answers = _attempts(someone, [(kind, host, port) for host in REFUSED])
    expected = "ConnectionRefusedError" if kind == "tcp" else "PermissionError"

    assert {place: answer for place, (answer, _) in answers.items() if answer != expected} == {}
    assert max(seconds for _, seconds in answers.values()) < 1
    assert {f"{kind} {host}" for host in REFUSED} & internet.arrived() == set()


def test_the_refused_addresses_do_answer_the_host(someone: WorldUser) -> None:
    """The far side does serve what is refused above: the refusals are ours."""
    far = [host for host in REFUSED if host not in (*world.HOST, "::ffff:10.1.2.3")]
    script = f"{CLIENT}\nprint(json.dumps([attempt('tcp', host, 80)[0] for host in {far!r}]))"
    done = subprocess.run(someone.as_user("/usr/bin/python3", "-c", script), capture_output=True, check=True)

    assert json.loads(done.stdout) == [f"tcp {host}" for host in far]


def test_multicast_and_broadcast_are_refused(someone: WorldUser) -> None:
    """No packet to many: mDNS, LLMNR, SSDP and broadcasts end in an error."""
    answers = _attempts(someone, [("udp", host, 5353) for host in ("224.0.0.251", "ff02::fb%net0", "192.0.2.255")])

    assert {answer for answer, _ in answers.values()} == {"PermissionError"}


def test_our_resolver_serves_names_only(someone: WorldUser) -> None:
    """Nothing but port 53 over UDP is reachable on the address that stands for the host's resolver."""
    answers = _attempts(someone, [("tcp", "192.0.2.53", 53), ("udp", "192.0.2.53", 123)])

    assert [answer for answer, _ in answers.values()] == ["ConnectionRefusedError", "PermissionError"]


def test_the_hosts_loopback_is_not_the_sandboxes(someone: WorldUser, internet: World) -> None:
    """A service on the host's loopback cannot be reached by any of its names; the sandbox's own can."""
    serve = "import socket;s=socket.create_server(('127.0.0.1',8123));print('up',flush=True);s.accept()"
    with subprocess.Popen(internet.host("/usr/bin/python3", "-c", serve), stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        server.stdout.readline()
        places = [("tcp", host, 8123) for host in ("127.0.0.1", "::1", "192.0.2.1", "192.0.2.2", *world.HOST)]
        answers = _attempts(someone, places)
        server.kill()

    assert {answer for answer, _ in answers.values()} == {"ConnectionRefusedError"}
    own = "import socket;s=socket.create_server(('127.0.0.1',8123));print(socket.create_connection(('127.0.0.1',8123)))"
    assert someone.python(own).returncode == 0


def test_an_answer_cannot_be_forged(someone: WorldUser, internet: World) -> None:
    """Sending "answers" from a public to a refused address gets nowhere, though anyone may bind to such addresses."""
    script = """
import socket
IPV6_FREEBIND = 78
def send(source, target):
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as made:
        made.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        made.bind((source, 4433))
        try:
            made.sendto(b"x", (target, 4433))
            print("sent")
        except PermissionError:
            print("refused")
send("fd00::1", "2606:4700::1111")
send("2606:4700::1111", "fd00::1")
"""
    assert someone.python(script).stdout.split() == ["refused", "refused"]
    assert "udp fd00::1" not in internet.arrived()


def test_the_filter_cannot_be_changed_from_inside(someone: WorldUser) -> None:
    """Nft and ip get EPERM, or no socket at all, and what was refused stays refused."""
    script = (
        "/usr/sbin/nft flush ruleset; echo $?; /usr/sbin/ip link set net0 down; echo $?; "
        "/usr/sbin/ip address add 10.1.2.9/24 dev net0; echo $?; "
        "/usr/sbin/ip route add 10.0.0.0/8 dev net0; echo $?; unshare -Un true; echo $?"
    )
    done = someone.run("run", "shell", "--", "/bin/sh", "-c", script, cwd=Path("/"))

    assert "0" not in done.stdout.split()
    assert len(done.stdout.split()) == 5
    assert _attempts(someone, [("tcp", "10.1.2.3", 80)])["tcp 10.1.2.3"][0] == "ConnectionRefusedError"


def test_the_hosts_addresses_do_not_show(someone: WorldUser) -> None:
    """The sandbox's interface, routes and files tell neither an address nor an interface name of the host."""
    script = "/usr/sbin/ip address; /usr/sbin/ip route; /usr/sbin/ip -6 route; cat /etc/resolv.conf /proc/1/cmdline"
    done = someone.run("run", "shell", "--", "/bin/sh", "-c", script, cwd=Path("/"))

    assert "192.0.2.2/24" in done.stdout
    for told in (*world.HOST, *world.GATEWAY, "2a00:7777", "wan", world.RESOLVER):
        assert told not in done.stdout


def test_exceptions_and_deny_rules_reach_the_filter(someone: WorldUser) -> None:
    """`private` opens what it names and no more; a `deny` entry closes its address and port and no more."""
    places = [
        ("tcp", "10.1.2.3", 80),
        ("tcp", "10.255.255.1", 80),
        ("tcp", "93.184.216.34", 80),
        ("udp", "93.184.216.34", 4433),
    ]
    answers = _attempts(someone, places, agent="lifted")

    assert [answer for answer, _ in answers.values()] == [
        "tcp 10.1.2.3", "ConnectionRefusedError", "ConnectionRefusedError", "udp 93.184.216.34",
    ]  # fmt: skip


def test_the_proxy_still_works_and_the_receipt_counts_the_rest(someone: WorldUser) -> None:
    """Through the proxy is recorded by name; what goes past it is counted: connections, bytes, refusals by kind."""
    script = (
        f"{CLIENT}\nimport urllib.request\n"
        "print(urllib.request.build_opener(urllib.request.ProxyHandler({'http': 'http://127.0.0.1:3128'}))"
        ".open('http://cloister.internal/').status)\n"
        "attempt('tcp', '93.184.216.34', 80), attempt('udp', '93.184.216.34', 4433), attempt('tcp', '10.1.2.3', 80)"
    )
    done = someone.python(script)
    [receipt] = someone.receipts()

    assert done.stdout.strip() == "200"
    assert receipt["direct"]["connections"] == 2
    assert receipt["direct"]["bytes_up"] > 0
    assert receipt["direct"]["bytes_down"] > 0
    # The self-probe's own attempts are counted as well.
    assert receipt["direct"]["refused"]["private network (RFC 1918)"] >= 2
    assert any("egress.mode = internet" in words for words in receipt["opt_outs"])


def test_a_reload_says_what_it_cannot_reach(someone: WorldUser) -> None:
    """The packet filter is loaded once: a reload that would change it names the run, one that would not is content."""
    run = someone.start("run", "shell", "--", "/bin/sh", "-c", "sleep 60", cwd=Path("/"))
    someone.wait_running()
    unchanged = someone.run("policy", "reload", cwd=Path("/"))
    someone.write_policy(POLICY.replace('"internet" }', '"internet", deny = ["93.184.216.34"] }'))
    os.chown(someone.home / ".config/cloister/cloister.toml", someone.uid, someone.uid)
    changed = someone.run("policy", "reload", cwd=Path("/"))
    someone.run("stop", "last", cwd=Path("/"))
    run.communicate(timeout=20)

    assert "start it again" not in unchanged.stdout + unchanged.stderr
    assert "start it again" in changed.stdout + changed.stderr


@pytest.mark.parametrize("victim", ["broker", "pasta", "outer"])
def test_whoever_is_killed_the_traffic_stops(someone: WorldUser, victim: str) -> None:
    """After kill -9 of any process of ours the run ends, nothing stays, and no packet leaves any more."""
    run = someone.start("run", "shell", "--", "/bin/sh", "-c", "sleep 60", cwd=Path("/"))
    someone.wait_running()
    pasta = [pid for pid in descendants([b"pasta\0", b"--config-net"]) if _owner(pid) == someone.uid]
    pid = {"broker": someone.broker_pid, "pasta": pasta[0], "outer": run.pid}[victim]
    os.kill(pid, signal.SIGKILL)
    run.communicate(timeout=20)

    assert run.returncode == (-signal.SIGKILL if victim == "outer" else 125)
    for each in pasta:
        try:
            wait_for(os.pidfd_open(each), 5)
        except ProcessLookupError:
            continue
    assert not [line for line in _processes(someone) if "pasta" in line]


def test_a_pasta_that_outlived_both_is_ended_by_the_next_broker(someone: WorldUser) -> None:
    """With broker and outer half killed at the same moment, the next start ends what is left."""
    run = someone.start("run", "shell", "--", "/bin/sh", "-c", "sleep 60", cwd=Path("/"))
    someone.wait_running()
    broker = someone.broker_pid
    for pid in (broker, run.pid):
        os.kill(pid, signal.SIGSTOP)  # so that neither sees the other die
    for pid in (run.pid, broker):
        os.kill(pid, signal.SIGKILL)
    run.communicate(timeout=20)

    assert someone.run("run", "shell", "--", "true", cwd=Path("/")).returncode == 0
    left = [line for line in _processes(someone) if "pasta" in line]
    assert left == []


def test_a_pasta_that_does_not_start_ends_the_run_with_its_words(internet: World) -> None:
    """Without a way out of the host there is no network: 125, pasta's own words, and nothing left."""
    user = WorldUser(internet, POLICY)
    subprocess.run(internet.host("ip", "route", "del", "default"), check=True)
    subprocess.run(internet.host("ip", "-6", "route", "del", "default"), check=True)
    try:
        done = user.run("run", "shell", "--", "true", cwd=Path("/"))
    finally:
        for address in world.GATEWAY:
            subprocess.run(internet.host("ip", "route", "add", "default", "via", address), check=True)
        user.close()

    assert done.returncode == 125
    assert "network-failed" in done.stderr
    assert "pasta did not start: " in done.stderr
    assert _settled(user) == []


def _owner(pid: int) -> int:
    """Return whose process it is; the folder belongs to root for those that are not dumpable."""
    words = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Uid:"))
    return int(words.split()[1])
