"""Agents in units in mode `internet`, on a machine with a network around it: three layers, and what ends a run."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Iterator
from typing import Any

import pytest
from runs_rig import ASK_PROXY, POLICY_FILE, Rig

from cloister.plan.firewall import WATCHDOG_UNIT
from support import lan
from support.machines import Machine

RESOLVER = "172.20.0.2"
POLICY = """\
schema = 1

[agents.web]
isolation = "unit"
command = ["/bin/sh"]
egress = { mode = "internet", private = ["192.168.77.9/32"], allow = ["allowed.example:443"] }

[agents.held]
isolation = "unit"
command = ["/bin/sh"]
egress = { mode = "internet", deny = ["93.184.216.34:25"] }

[agents.held.unit]
block = ["2606:2800:220:1::/64"]
firewall = ["tcp dport 22 counter reject with tcp reset"]

[agents.nest]
isolation = "unit"
command = ["/bin/sh"]
egress = { mode = "internet" }
hardening = { nested = true }

[profiles.other.unit]
block = ["9.9.9.0/24"]

[users.alice]
agents = ["web", "held", "nest"]
roots = ["~/p"]
"""
PROBE = "/usr/bin/python3 net_probe.py"
PUBLIC4, PUBLIC6 = lan.PUBLIC
NAS = "192.168.77.9"
REFUSED = [
    *(each for each in (*lan.LAN4, *lan.LAN6) if each != NAS), *lan.TAILNET, *lan.METADATA, *lan.EMBEDDING, *lan.OTHER,
    lan.HOST4, lan.HOST6, lan.HOST_PUBLIC, "192.0.2.1",
]  # fmt: skip
SOON_S = 2.0
HARD = 1.1
SLOW = pytest.mark.slow
LIVE = "sleep 1000"


@pytest.fixture(scope="module")
def rig(suite: str, layers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """One installed machine with a network, on Debian 12 and 13."""
    with Machine(suite, layers(suite), tmp_path_factory.mktemp(f"internet-{suite}")) as machine:
        lan.join(machine)
        machine.write("/etc/resolv.conf", f"nameserver {RESOLVER}\n")
        made = Rig(machine, POLICY)
        machine.write(f"{made.project}/net_probe.py", machine.read("/srv/tests/support/net_probe.py"), owner="alice")
        yield made


@pytest.fixture(autouse=True)
def nothing_left(rig: Rig) -> Iterator[None]:
    """After each test nothing of its runs is left anywhere."""
    yield
    rig.until(lambda: not living(rig), shown=lambda: living(rig))


def living(rig: Rig) -> dict[str, list[str]]:
    """Return what is left of runs, and of processes of the accounts."""
    left = rig.remains()
    left["in the workspace"] = [name for name in left["in the workspace"] if name != "net_probe.py"]
    left["processes"] = rig.machine.run(
        ["sh", "-c", "pgrep -l -U cl-web-alice,cl-held-alice,cl-nest-alice; true"]
    ).stdout.split()
    return {kind: names for kind, names in left.items() if names}


def tried(rig: Rig, *targets: str, agent: str = "web") -> dict[str, str]:
    """Return what came of targets, from inside of a run."""
    done = rig.sh(f"{PROBE} {' '.join(targets)}", agent=agent)
    assert done.returncode == 0, done.stderr
    return {target: outcome for target, (outcome, _) in json.loads(done.stdout).items()}


def inside(rig: Rig, run: str, *targets: str) -> dict[str, str]:
    """Return what came of targets, from inside of a living run."""
    done = rig.cloister("exec", run, "--", "/bin/sh", "-c", f"{PROBE} {' '.join(targets)}")
    return {target: outcome for target, (outcome, _) in json.loads(done.stdout).items()}


def network_unit(run: str) -> str:
    """Return the unit in which a run's pasta lives."""
    return f"cloister-net-{run}.service"


def ended(rig: Rig, run: str) -> dict[str, Any]:
    """Return the receipt of a run that comes to its end by itself, soon."""
    rig.until(lambda: rig.cloister("receipt", run).returncode == 0)
    return rig.receipt(run)


# --- what is reached, and what is not -------------------------------------------------------------


def test_public_addresses_by_tcp_udp_and_name(rig: Rig) -> None:
    """Public servers and what the policy opens answer, the host's resolver too; the receipt counts it."""
    wanted = [f"tcp:{PUBLIC4}:80", f"tcp:{PUBLIC6}:80", f"udp:{PUBLIC4}:53", f"udp:{PUBLIC6}:53", f"tcp:{NAS}:80"]
    answers = tried(rig, *wanted, "udp:192.0.2.53:53")

    assert set(answers.values()) == {"open"}, answers
    counted = rig.receipt()["direct"]
    assert counted["connections"] >= len(wanted)
    assert counted["names"] == 1
    listed = rig.machine.run(["nft", "list", "table", "inet", "cloister"]).stdout
    uid = rig.machine.run(["id", "-u", "cl-web-alice"]).stdout.strip()
    sent = re.search(rf"counter sent_{uid} {{\s+comment [^\n]+\s+packets (\d+) ", listed)
    assert sent
    assert int(sent[1]) >= len(wanted)


def test_everything_else_is_refused_at_once(rig: Rig) -> None:
    """LAN, tailnet, metadata, translated addresses, documentation and the host: an error, no silence, and counted."""
    answers = tried(rig, *(f"{kind}:{each}:{port}" for each in REFUSED for kind, port in (("tcp", 80), ("udp", 53))))

    assert {target for target, outcome in answers.items() if outcome not in {"ECONNREFUSED", "EPERM"}} == set()
    assert sum(rig.receipt()["direct"]["refused"].values()) >= len(answers)


def test_the_loopback_is_the_units_own(rig: Rig) -> None:
    """No port of the host is reachable under any name; the proxy inside is, and obeys the policy."""
    serve = "import socket,time; s=socket.create_server(('',8123)); time.sleep(60)"
    rig.machine.run(["systemd-run", "-q", "--unit=test-served", "/usr/bin/python3", "-c", serve])
    rig.machine.wait_for("ss -ltn | grep -q :8123")
    answers = tried(rig, *(f"tcp:{each}:8123" for each in ("127.0.0.1", "127.0.0.53", lan.HOST4, lan.HOST_PUBLIC)))
    rig.machine.run(["systemctl", "stop", "test-served"])

    assert set(answers.values()) == {"ECONNREFUSED"}
    asked = rig.cloister("run", "web", "--", "/bin/bash", "-c", ASK_PROXY, f"{lan.LAN4[0]}:80")
    assert "403" in asked.stdout


def test_an_agents_own_rules_hold_for_it_alone(rig: Rig) -> None:
    """`block`, `firewall` and `deny` refuse to one agent what another one reaches, and refuse it at once."""
    targets = [f"tcp:{PUBLIC4}:22", f"tcp:{PUBLIC6}:80", f"tcp:{PUBLIC4}:25"]

    assert set(tried(rig, *targets, agent="held").values()) == {"ECONNREFUSED"}
    assert tried(rig, f"tcp:{PUBLIC4}:80", agent="held") == {f"tcp:{PUBLIC4}:80": "open"}
    assert set(tried(rig, *targets).values()) == {"open"}


@pytest.mark.parametrize("agent", ["web", "nest"])
def test_the_agent_changes_nothing_of_its_network(rig: Rig, agent: str) -> None:
    """No filter, address or route, no namespace of pasta's: the same uid is not enough, nor is a sandbox of its own."""
    attack = r"""
PATH=/usr/sbin:/usr/bin:/bin
for words in "nft flush ruleset" "ip link set net0 down" "ip route add 10.0.0.0/8 dev net0"; do
    $words 2>&1 && echo "done: $words"
done
for pid in /proc/[0-9]*; do
    for name in ns/net ns/user; do
        there=$(readlink $pid/$name 2>/dev/null) || continue
        [ "$there" = "$(readlink /proc/self/$name)" ] || echo "seen: $pid/$name"
    done
done
echo tried
"""
    within = "" if agent == "web" else f"unshare -Ur sh -c {shlex.quote(attack)}\n"
    done = rig.sh(attack + within, agent=agent)

    assert done.stdout.count("tried") == (1 if agent == "web" else 2)
    assert "done:" not in done.stdout
    assert "seen:" not in done.stdout
    hidden = rig.sh("cat /proc/[0-9]*/comm", agent="web").stdout
    assert rig.machine.suite == "bookworm" or "pasta" not in hidden


# --- each layer without the others ----------------------------------------------------------------


def test_each_layer_holds_without_the_one_above(rig: Rig) -> None:
    """With the filter inside gone the account's holds, in any cgroup; with both gone, systemd's list does."""
    run = rig.detach(LIVE, agent="web")
    unit, lan4, pasta = network_unit(run), f"tcp:{lan.LAN4[0]}:80", "pgrep -f 'pasta .*--config-net' -U cl-web-alice"
    target = rig.machine.run(["sh", "-c", pasta]).stdout.split()[0]
    main = rig.main_pid(f"cloister-run-{run}.service")
    assert inside(rig, run, lan4, f"tcp:{PUBLIC4}:80") == {lan4: "ECONNREFUSED", f"tcp:{PUBLIC4}:80": "open"}

    rig.machine.run(["nsenter", "-t", str(main), "--net", "nft", "flush", "ruleset"])
    second = inside(rig, run, lan4, f"tcp:{lan.HOST4}:22", f"tcp:{PUBLIC4}:80")
    rig.machine.run(["systemd-run", "-q", "--unit=test-sibling", "sleep", "100"])
    cgroup = rig.machine.show("test-sibling.service", "ControlGroup")
    places = "/sys/fs/cgroup/unified /sys/fs/cgroup/systemd /sys/fs/cgroup"
    moved = (
        f"for top in {places}; do [ -e $top{cgroup}/cgroup.procs ] && echo {target} >$top{cgroup}/cgroup.procs; done"
    )
    watchdog = rig.main_pid(WATCHDOG_UNIT)
    rig.machine.run(["kill", "-STOP", str(watchdog)])
    rig.machine.run(["nft", "flush", "ruleset"])
    third = inside(rig, run, lan4, f"tcp:{PUBLIC4}:80")
    rig.machine.run(["sh", "-c", "nft -f /var/lib/cloister/firewall.nft"])
    rig.machine.run(["sh", "-c", f"{moved}; true"])
    sibling = inside(rig, run, lan4, f"tcp:{lan.HOST4}:22", f"tcp:{PUBLIC4}:80")
    rig.machine.run(["kill", "-CONT", str(watchdog)])
    rig.machine.run(["systemctl", "stop", "test-sibling"])

    for answers in (second, third, sibling):
        assert answers.pop(f"tcp:{PUBLIC4}:80") == "open"
        assert "open" not in answers.values(), (second, third, sibling)
    rig.cloister("stop", run)
    rig.until(lambda: rig.machine.show(unit, "ActiveState") in {"inactive", ""})


def test_the_agents_unit_stays_as_hard(rig: Rig) -> None:
    """`systemd-analyze security` gives the agent's own unit at most 1.1, and it is in no network of the host's."""
    run = rig.detach(LIVE, agent="web")
    told = rig.machine.run(["systemd-analyze", "security", "--no-pager", f"cloister-run-{run}.service"]).stdout
    spaces = [
        rig.machine.run(["readlink", f"/proc/{pid}/ns/net"]).stdout
        for pid in (1, rig.main_pid(network_unit(run)), rig.main_pid(f"cloister-run-{run}.service"))
    ]
    rig.cloister("stop", run)

    level = re.search(r"level for \S+: ([0-9.]+)", told)
    assert level
    assert float(level[1]) <= HARD
    assert spaces[0] == spaces[1] != spaces[2]


# --- what ends it ---------------------------------------------------------------------------------


def test_a_foreign_flush_ends_the_run(rig: Rig) -> None:
    """Somebody flushes the host's packet filter: the network is gone within two seconds, then the run, with 125."""
    run = rig.detach(LIVE, agent="web")
    began = time.monotonic()
    rig.machine.run(["nft", "flush", "ruleset"])
    rig.until(lambda: rig.machine.show(network_unit(run), "MainPID") in {"", "0"})

    assert time.monotonic() - began < SOON_S
    told = ended(rig, run)
    assert (told["exit_code"], told["reason"]) == (125, "network-failed")
    rig.machine.wait_for(f"journalctl -b -u {WATCHDOG_UNIT} | tail -1 | grep -q 'whole again'")
    assert tried(rig, f"tcp:{PUBLIC4}:80", f"tcp:{lan.LAN4[0]}:80") == {
        f"tcp:{PUBLIC4}:80": "open", f"tcp:{lan.LAN4[0]}:80": "ECONNREFUSED",
    }  # fmt: skip


@pytest.mark.parametrize("who", ["pasta", pytest.param("shim", marks=SLOW), pytest.param("holder", marks=SLOW)])
def test_a_killed_network_ends_the_run(rig: Rig, who: str) -> None:
    """Nobody takes the silence for an empty internet: 125, with the reason, and nothing is left."""
    run = rig.detach(LIVE, agent="web")
    main = rig.main_pid(network_unit(run))
    below = rig.machine.run(["pgrep", "-P", str(main)]).stdout.split()
    names = {pid: rig.machine.read(f"/proc/{pid}/comm").strip() for pid in below}
    pasta = next(int(pid) for pid, name in names.items() if name.startswith("pas"))
    rig.kill({"pasta": pasta, "shim": main}.get(who) or next(int(pid) for pid in below if int(pid) != pasta))

    told = ended(rig, run)
    assert (told["exit_code"], told["reason"]) == (125, "network-failed")


@pytest.mark.slow
@pytest.mark.parametrize("who", ["agent", "proxyd", "hostd", "client"])
def test_killed_elsewhere_nothing_of_the_network_is_left(rig: Rig, who: str) -> None:
    """Whoever is killed, pasta goes with the run; hostd's end ends nothing."""
    run = rig.detach(LIVE, agent="web")
    match who:
        case "agent":
            rig.kill(rig.main_pid(f"cloister-run-{run}.service"))
        case "client":
            rig.kill(rig.broker_pid())
        case "proxyd":
            rig.kill(rig.main_pid("cloister-proxyd.service"))
        case _:
            rig.kill(rig.main_pid("cloister-hostd.service"))
            assert inside(rig, run, f"tcp:{PUBLIC4}:80") == {f"tcp:{PUBLIC4}:80": "open"}
            rig.cloister("stop", run)
    rig.until(lambda: rig.machine.show(network_unit(run), "MainPID") in {"", "0"})
    assert tried(rig, f"tcp:{PUBLIC4}:80") == {f"tcp:{PUBLIC4}:80": "open"}


@pytest.mark.slow
def test_root_is_killed_while_it_waits_for_pasta(rig: Rig) -> None:
    """The child of hostd dies before the namespace is connected: the caller hears of it, and nothing is left."""
    machine = rig.machine
    machine.run(["sh", "-c", "mv /usr/bin/pasta /usr/bin/away; printf '#!/bin/sh\nsleep 600\n' >/usr/bin/pasta"])
    machine.run(["chmod", "0755", "/usr/bin/pasta"])
    try:
        waiting = machine.popen(["cloister", "run", "web", "--", "/bin/true"], user="alice", cwd=rig.project)
        machine.wait_for("pgrep -U cl-web-alice sleep")
        machine.run(["pkill", "-KILL", "-P", str(rig.main_pid("cloister-hostd.service"))])
        assert waiting.wait(30) != 0
        rig.until(lambda: not living(rig), shown=lambda: living(rig))
    finally:
        machine.run(["mv", "/usr/bin/away", "/usr/bin/pasta"])
    assert rig.sh("exit 0", agent="web").returncode == 0


# --- what is refused before anything starts -------------------------------------------------------


def test_what_is_missing_is_said_with_a_remedy(rig: Rig) -> None:
    """No pasta, no tap device for accounts, no packet filter, rules that it does not know: refused, nothing is left."""
    machine = rig.machine

    def refused(*words: str) -> str:
        done = rig.cloister("run", *words, "web", "--", "/bin/true")
        assert done.returncode == 125, done
        assert "try:" in done.stderr
        return str(done.stderr)

    machine.run(["sh", "-c", "mv /usr/bin/pasta /usr/bin/away"])
    try:
        machine.run(["systemctl", "restart", "cloister-proxyd.service"])
        assert "[internet-unavailable]" in (said := refused())
        assert "passt" in said
    finally:
        machine.run(["mv", "/usr/bin/away", "/usr/bin/pasta"])
        machine.run(["systemctl", "restart", "cloister-proxyd.service"])
    machine.run(["chmod", "0600", "/dev/net/tun"])
    assert "/dev/net/tun" in refused()
    machine.run(["chmod", "0666", "/dev/net/tun"])
    assert "[unit-internet]" in refused("--profile", "other")
    machine.run(["systemctl", "stop", WATCHDOG_UNIT])
    machine.run(["nft", "delete", "table", "inet", "cloister"])
    assert "packet filter of this account is not loaded" in refused()
    machine.run(["systemctl", "start", WATCHDOG_UNIT])
    assert rig.sh("exit 0", agent="web").returncode == 0


def test_another_resolver_is_said(rig: Rig) -> None:
    """The packet filter knows whom the host asked for names at the last apply; that it is another one now is said."""
    rig.machine.write("/etc/resolv.conf", "nameserver 172.20.0.99\n")
    assert rig.sh("exit 0", agent="web").returncode == 0
    rig.machine.write("/etc/resolv.conf", f"nameserver {RESOLVER}\n")

    [told] = [notice for notice in rig.receipt()["notices"] if "172.20.0.99" in notice]
    assert "sudo cloister apply" in told


def test_the_plan_says_what_it_is(rig: Rig) -> None:
    """`plan` shows pasta's unit and what is given up; the policy of that machine is what was installed."""
    shown = rig.cloister("plan", "web").stdout

    assert "unit of its network cloister-net-" in shown
    assert "BindsTo=cloister-watchdog.service" in shown
    assert "every public address, directly" in shown
    assert "mode = " in rig.machine.read(POLICY_FILE)
