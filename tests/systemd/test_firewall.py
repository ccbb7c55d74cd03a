"""The packet filter of agents' accounts, on a real host: what is refused to whom, and who is left alone.

Each machine has a LAN, a tailnet, cloud metadata and a public server (`support.lan`). Every refusal is at once, and
has its twin: the same address answers another user, and the public server answers the agent.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from ipaddress import ip_network

import pytest

from cloister.egress.addresses import Guard
from cloister.egress.nft_units import AccountRules, Passed, passed, ruleset
from cloister.isolation.firewall_units import firewall_unit
from cloister.plan.unit import FIRST_UID
from support import lan
from support.lan import EMBEDDING, HOST4, HOST6, HOST_PUBLIC, LAN4, LAN6, METADATA, OTHER, PUBLIC, TAILNET
from support.machines import PYTHON, Machine

SHUT, WEB, NAS, STRICT, UNKNOWN = (FIRST_UID + number for number in range(5))
NAMES = {SHUT: "cl-shut-alice", WEB: "cl-web-alice", NAS: "cl-nas-alice", STRICT: "cl-strict-alice"}
ACCOUNTS = (
    AccountRules(NAMES[SHUT], SHUT),
    AccountRules(NAMES[WEB], WEB, Guard()),
    AccountRules(NAMES[NAS], NAS, Guard(exceptions=(ip_network("192.168.77.9/32"), ip_network("127.0.0.0/8")))),
    AccountRules(NAMES[STRICT], STRICT, Guard(), statements=("tcp dport 22 counter reject with tcp reset",)),
)
PROBE = ["/usr/bin/python3", "/srv/tests/support/net_probe.py"]
INSTALL = "import sys; from cloister.host import firewall; firewall.install(sys.stdin.read())"
REFUSED = (*LAN4, *LAN6, *TAILNET, *METADATA, *EMBEDDING, *OTHER)
AT_ONCE_S = 0.5


@pytest.fixture(scope="module")
def host(suite: str, layers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine with the packet filter and a network around it."""
    with Machine(suite, layers(suite), tmp_path_factory.mktemp(f"firewall-{suite}")) as machine:
        for uid, name in NAMES.items():
            machine.run(["useradd", "--uid", str(uid), "--no-create-home", "--shell", "/usr/sbin/nologin", name])
        machine.run(["mkdir", "-p", "/var/lib/cloister", "/run/cloister"])
        lan.join(machine)
        load(machine)
        yield machine


def load(machine: Machine, accounts: tuple[AccountRules, ...] = ACCOUNTS) -> None:
    """Install the table as `cloister apply` does."""
    machine.run([PYTHON, "-c", INSTALL], input=ruleset(accounts))


def targets(addresses: tuple[str, ...], *, tcp: int = 80, udp: int = 53) -> list[str]:
    """Return TCP and UDP targets for the probe."""
    return [f"{kind}:{each}:{port}" for each in addresses for kind, port in (("tcp", tcp), ("udp", udp)) if port]


def probe(machine: Machine, uid: int, words: list[str], *before: str) -> dict[str, tuple[str, float]]:
    """Try targets as a uid, with other words in front of the program."""
    done = machine.run(["setpriv", f"--reuid={uid}", "--clear-groups", *before, *PROBE, *words], timeout=120)
    return {target: (said, took) for target, (said, took) in json.loads(done.stdout).items()}


def refused(results: dict[str, tuple[str, float]]) -> bool:
    """Say whether all of them were refused, at once: by a reset for TCP, at the sender for the rest."""
    wrong = {
        target: (said, took)
        for target, (said, took) in results.items()
        if said != ("ECONNREFUSED" if target.startswith("tcp") else "EPERM") or took > AT_ONCE_S
    }
    assert not wrong
    return bool(results)


def opened(results: dict[str, tuple[str, float]]) -> bool:
    """Say whether all of them answered."""
    assert {target: said for target, (said, _) in results.items() if said != "open"} == {}
    return bool(results)


def test_what_the_guard_refuses_is_refused_and_nothing_else(host: Machine) -> None:
    """B4, B5, BF7: LAN, tailnet, clouds' metadata, NAT64, 6to4, Teredo, ISATAP; at once. The public server answers."""
    assert refused(probe(host, WEB, targets(REFUSED)))
    assert opened(probe(host, WEB, targets(PUBLIC)))
    assert opened(probe(host, 1000, targets((*REFUSED, *PUBLIC)))), "the addresses are there"


def test_a_mapped_address_is_the_ipv4_one(host: Machine) -> None:
    """An IPv6 socket that asks for ::ffff:10.66.0.2 sends IPv4, and is judged as that."""
    mapped = tuple(f"::ffff:{each}" for each in ("10.66.0.2", "169.254.169.254"))

    assert refused(probe(host, WEB, targets(mapped)))
    assert opened(probe(host, WEB, targets((f"::ffff:{PUBLIC[0]}",))))
    assert opened(probe(host, 1000, targets(mapped)))


ABSENT = {"EPROTONOSUPPORT", "EAFNOSUPPORT", "ESOCKTNOSUPPORT"}


def test_other_protocols_are_no_way_round(host: Machine) -> None:
    """Multipath TCP is TCP; what is neither TCP nor UDP, and what the kernel would send by itself, does not pass."""
    results = probe(host, WEB, [f"{kind}:{LAN4[0]}:80" for kind in ("mptcp", "udplite", "sctp", "smc")])
    said = {target.partition(":")[0]: said for target, (said, _) in results.items()}
    public = probe(host, WEB, [f"{kind}:{PUBLIC[0]}:80" for kind in ("mptcp", "udplite", "sctp")])

    assert said.pop("mptcp") in {"ECONNREFUSED", *ABSENT}
    assert set(said.values()) <= {"EPERM", "ECONNREFUSED", "silence", *ABSENT}
    assert public[f"mptcp:{PUBLIC[0]}:80"][0] in {"open", *ABSENT}
    assert public[f"udplite:{PUBLIC[0]}:80"][0] in {"EPERM", *ABSENT}


def test_an_account_in_the_default_profile_reaches_nothing(host: Machine) -> None:
    """Outside of its unit, where it has no network namespace of its own, everything is refused, also what is public."""
    everything = targets((*PUBLIC, *LAN4[:1], *LAN6[:1], "127.0.0.1", "::1", HOST_PUBLIC))

    assert refused(probe(host, SHUT, everything))


def test_a_uid_of_ours_that_the_table_does_not_know_reaches_nothing(host: Machine) -> None:
    """An account made a moment before the table is loaded anew is refused by its range."""
    assert refused(probe(host, UNKNOWN, targets((*PUBLIC, *LAN4[:1], "127.0.0.1"))))
    assert opened(probe(host, FIRST_UID - 1, targets((*PUBLIC, *LAN4[:1])))), "the range ends where it should"


def test_the_host_itself_is_closed(host: Machine) -> None:
    """BF7: services on loopback (a resolver, a proxy, a database) and on the host's own addresses are out of reach."""
    code = (
        "import socket,sys,time\n"
        "servers=[socket.create_server(('0.0.0.0',8099)),socket.create_server(('::',8099),family=socket.AF_INET6)]\n"
        "resolver=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); resolver.bind(('127.0.0.53',53))\n"
        "print('up',flush=True); time.sleep(60)"
    )
    with host.popen(["/usr/bin/python3", "-c", code], stdout=subprocess.PIPE, text=True) as serving:
        assert serving.stdout
        assert serving.stdout.readline() == "up\n"
        words = targets(("127.0.0.1", "127.8.8.8", "::1", HOST4, HOST6, HOST_PUBLIC), tcp=8099, udp=0)
        assert refused(probe(host, WEB, [*words, "udp:127.0.0.53:53"]))
        # The server accepts and says nothing: whoever gets to it waits.
        there = probe(host, 1000, words[:1])
        serving.kill()

    assert there["tcp:127.0.0.1:8099"][0] == "silence"


SERVE = """
import socket
server = socket.create_server(("0.0.0.0", 8097)); server.settimeout(1.5); print("up", flush=True)
try:
    server.accept(); print("met")
except TimeoutError:
    print("nobody")
"""


def test_the_lan_does_not_get_to_a_port_of_the_agents(host: Machine) -> None:
    """What an agent serves answers nobody in the LAN: the answer is a packet of the agent's too."""
    far = f"nsenter --target $(systemctl show --value -p MainPID {lan.FAR}) --net"
    ask = ["sh", "-c", f'exec {far} "$@"', "sh", *PROBE, f"tcp:{HOST4}:8097"]
    met = {}
    for uid in (WEB, SHUT, 1000):
        command = ["setpriv", f"--reuid={uid}", "--clear-groups", "/usr/bin/python3", "-c", SERVE]
        with host.popen(command, stdout=subprocess.PIPE, text=True) as serving:
            assert serving.stdout
            assert serving.stdout.readline() == "up\n"
            host.run(ask)
            met[uid] = serving.stdout.read()

    assert met == {WEB: "nobody\n", SHUT: "nobody\n", 1000: "met\n"}


def test_statements_of_one_agent_are_its_own(host: Machine) -> None:
    """BF5: `tcp dport 22 … reject` for one agent refuses it ssh, and neither another agent nor anybody else."""
    ssh = [f"tcp:{PUBLIC[0]}:22", f"tcp:{PUBLIC[1]}:22"]

    assert refused(probe(host, STRICT, ssh))
    assert opened(probe(host, STRICT, targets(PUBLIC)))
    assert opened(probe(host, WEB, ssh))
    assert opened(probe(host, 1000, ssh))
    assert opened(probe(host, 0, ssh))


def test_one_address_inside_a_refused_network_can_be_opened(host: Machine) -> None:
    """BF6: a NAS of the LAN, or the host's loopback, for one agent; neighbours stay closed, and it to others."""
    assert opened(probe(host, NAS, targets(("192.168.77.9",))))
    assert refused(probe(host, NAS, targets(("192.168.66.2", "10.66.0.2", HOST4))))
    assert refused(probe(host, WEB, targets(("192.168.77.9",))))
    # Nothing listens there: the answer is the host's own, and it is one.
    said = probe(host, NAS, ["udp:127.0.0.1:9", "udp:192.168.66.1:9"])
    assert said["udp:127.0.0.1:9"][0] == "ECONNREFUSED"
    assert said["udp:192.168.66.1:9"][0] == "EPERM"


def test_what_passes_and_what_is_refused_is_counted_for_each_account(host: Machine) -> None:
    """BF6: `cloister status` can say who was refused how often; other accounts' counters stand still."""
    load(host)
    probe(host, WEB, targets((PUBLIC[0], LAN4[0])))
    counted = passed(host.run(["nft", "-j", "list", "table", "inet", "cloister"]).stdout.encode())

    assert counted[WEB].refused == 2
    assert counted[WEB].sent >= 3
    assert counted[WEB].sent_bytes > 100
    assert counted[STRICT] == Passed(0, 0, 0)


# ---- ways around it ----


def by_unit(host: Machine, uid: int, words: list[str], *properties: str) -> dict[str, tuple[str, float]]:
    """Probe from a unit of that uid."""
    flags = [flag for each in properties for flag in ("-p", each)]
    done = host.run(
        ["systemd-run", "--quiet", "--pipe", "--wait", "--collect", "-p", f"User={NAMES[uid]}", *flags, *PROBE, *words]
    )
    return {target: (said, took) for target, (said, took) in json.loads(done.stdout).items()}


def test_a_slice_that_comes_again_changes_nothing(host: Machine) -> None:
    """BF1 to BF3: no rule names a cgroup: one that is stopped and made anew, like its units, is filtered as before."""
    words = targets((LAN4[0], METADATA[0]))
    for _ in range(2):
        assert refused(by_unit(host, WEB, words, "Slice=cloister.slice"))
        assert opened(by_unit(host, WEB, targets(PUBLIC), "Slice=cloister.slice"))
        host.run(["systemctl", "stop", "cloister.slice"])
    assert refused(by_unit(host, WEB, words, "Slice=machine.slice"))


def test_a_user_manager_of_the_account_is_no_way_out(host: Machine) -> None:
    """BF4, BF9: `systemd-run --user` with lingering starts outside of unit and slice, and is refused the same."""
    name = NAMES[WEB]
    host.run(["loginctl", "enable-linger", name])
    host.wait_for(f"test -S /run/user/{WEB}/systemd/private")
    try:
        done = host.run(
            ["setpriv", f"--reuid={WEB}", f"--regid={WEB}", "--clear-groups", "env", f"XDG_RUNTIME_DIR=/run/user/{WEB}",
             "systemd-run", "--user", "--quiet", "--pipe", "--wait", *PROBE, *targets((LAN4[0], LAN6[0], PUBLIC[0]))]
        )  # fmt: skip
    finally:
        host.run(["loginctl", "disable-linger", name])
        host.run(["loginctl", "terminate-user", name], check=False)
    results = json.loads(done.stdout)
    public = {target: results.pop(target) for target in list(results) if PUBLIC[0] in target}

    assert refused(results)
    assert opened(public)


def test_another_cgroup_is_no_way_out(host: Machine) -> None:
    """BF4: a process that got into a sibling's cgroup.procs, here by root's hand, is filtered by its uid."""
    host.run(["systemd-run", "--quiet", "--unit", "test-sibling", "sleep", "60"])
    where = "/sys/fs/cgroup/unified" if host.hybrid else "/sys/fs/cgroup"
    script = f'echo $$ >{where}/system.slice/test-sibling.service/cgroup.procs; cat /proc/self/cgroup >&2; exec "$@"'
    command = ["sh", "-c", script, "sh", "setpriv", f"--reuid={WEB}", "--clear-groups", *PROBE]
    done = host.run([*command, *targets((LAN4[0], LAN6[0]))])
    host.run(["systemctl", "stop", "test-sibling"])

    assert "test-sibling.service" in done.stderr
    assert refused(json.loads(done.stdout))


def test_root_in_an_own_user_namespace_is_no_way_out(host: Machine) -> None:
    """BF4, BF8: being root of a user namespace (as in a rootless container) leaves the uid that the kernel sees."""
    inside = ["unshare", "--user", "--map-root-user"]

    assert refused(probe(host, WEB, targets((LAN4[0], LAN6[0], METADATA[0])), *inside))
    assert opened(probe(host, WEB, targets(PUBLIC), *inside))
    assert host.run(
        ["setpriv", f"--reuid={WEB}", "--clear-groups", *inside, "nft", "flush", "ruleset"], check=False
    ).returncode, "and the table is not its own"


def test_a_connection_from_before_the_table_ends(host: Machine) -> None:
    """What was open when a network became refused carries nothing more: packets are judged, not connections."""
    host.run(["nft", "delete", "table", "inet", "cloister"])
    command = ["setpriv", f"--reuid={WEB}", "--clear-groups", *PROBE, "--held", LAN4[0], "80"]
    with host.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as held:
        assert held.stdin
        assert held.stdout
        assert held.stdout.readline() == "held\n"
        held.stdin.write("\n")
        assert held.stdout.readline() == "open\n", "it carried while there was no table"
        load(host)
        held.stdin.write("\n")
        assert held.stdout.readline() in {"silence\n", "ECONNREFUSED\n", "ECONNRESET\n"}


PASS_ON = """
import json, os, socket, subprocess, sys
path, maker, user, address = sys.argv[1:]
listener = socket.socket(socket.AF_UNIX); listener.bind(path); os.chmod(path, 0o777); listener.listen()
probe = ["/usr/bin/python3", "/srv/tests/support/net_probe.py"]
def as_uid(uid): return ["setpriv", "--reuid=" + uid, "--clear-groups"]
giver = subprocess.Popen([*as_uid(maker), *probe, "--handed", path])
link, _ = listener.accept()
_, [got], _, _ = socket.recv_fds(link, 1, 1)
words = [*as_uid(user), *probe, "--given", str(got), address, "80"]
print(subprocess.run(words, pass_fds=[got], stdout=-1, text=True).stdout, end="")
link.send(b"x"); giver.wait(); os.unlink(path)
"""


def test_a_socket_is_its_makers(host: Machine) -> None:
    """A socket that the agent made is refused in anybody's hands.

    The known limit is the twin: one that another uid made and passes in counts as that uid's. Nobody but the run's
    broker has a channel to pass one, and it passes none.
    """

    def connect(maker: int, user: int) -> str:
        return str(
            host.run(["/usr/bin/python3", "-c", PASS_ON, "/run/test-pass", str(maker), str(user), LAN4[0]]).stdout
        )

    assert connect(WEB, 1000) == "ECONNREFUSED\n"
    assert connect(WEB, WEB) == "ECONNREFUSED\n"
    assert connect(1000, WEB) == "open\n", "documented: SECURITY.md"


# ---- loading it ----


def test_a_text_that_does_not_load_changes_nothing(host: Machine) -> None:
    """BF1: one bad line refuses the text before the host's table is touched; the old one, and others' tables, stand."""
    host.run(["nft", "add table inet others; add chain inet others c; add rule inet others c counter"])
    bad = ruleset(ACCOUNTS).replace("tcp dport 22 counter", "tcp dport nonsense counter")
    done = host.run([PYTHON, "-c", INSTALL], input=bad, check=False)
    good = host.run([PYTHON, "-c", "from cloister.host import firewall; print(repr(firewall.trouble()))"]).stdout

    assert done.returncode
    assert "nft does not take the packet filter" in done.stderr
    assert good == "''\n"
    assert refused(probe(host, WEB, targets(LAN4[:1])))
    assert "counter packets" in host.run(["nft", "list", "table", "inet", "others"]).stdout
    host.run(["nft", "delete", "table", "inet", "others"])


CHANGES = (
    "delete table inet cloister",
    "add table inet cloister { flags dormant; }",
    "flush chain inet cloister output",
    "insert rule inet cloister refuse accept",
    "add rule inet cloister output counter",
    f"add element inet cloister agents {{ {FIRST_UID + 77} : accept }}",
    f"delete element inet cloister agents {{ {SHUT} : goto closed }}",
    "delete element inet cloister refused4_0 { 10.0.0.0/8 }",
    "add chain inet cloister more",
    "add chain inet cloister output { type filter hook output priority filter; policy drop; }",
)


def test_every_change_of_the_table_is_seen_before_a_unit_starts(host: Machine) -> None:
    """`uid_filtered`, which hostd asks, says no to a table that is gone, switched off, or differs from the file."""
    code = "from cloister.host import firewall; print(firewall.uid_filtered(int(__import__('sys').argv[1])))"

    def filtered(uid: int) -> bool:
        return str(host.run([PYTHON, "-c", code, str(uid)]).stdout) == "True\n"

    assert filtered(WEB)
    assert filtered(UNKNOWN), "the range is refused as a whole"
    assert not filtered(1000)
    for change in CHANGES:
        host.run(["nft", change])
        assert not filtered(WEB), change
        load(host)
    assert filtered(WEB)


def test_it_is_loaded_at_boot_before_there_is_any_network(fresh_machine) -> None:
    """BF1, BF3, BF9: no session, slice or user is needed; the file is loaded first, also when its table is large."""
    host: Machine = fresh_machine()
    host.write("/etc/systemd/system/cloister-firewall.service", firewall_unit("/usr/sbin/nft"))
    host.run(["mkdir", "-p", "/var/lib/cloister", "/run/cloister"])
    load(host, tuple(AccountRules(f"a{number}", FIRST_UID + number, Guard()) for number in range(1000)))
    host.run(["systemctl", "enable", "cloister-firewall.service"])
    host.reboot()
    lan.join(host)

    assert host.show("cloister-firewall.service", "ActiveState") == "active"
    assert "network-pre.target" in host.show("cloister-firewall.service", "Before")
    assert refused(probe(host, WEB, targets((LAN4[0], LAN6[0], METADATA[0]))))
    assert opened(probe(host, WEB, targets(PUBLIC)))
    host.run(["systemctl", "stop", "cloister-firewall.service"])
    assert refused(probe(host, WEB, targets(LAN4[:1]))), "stopping the unit takes nothing away"
