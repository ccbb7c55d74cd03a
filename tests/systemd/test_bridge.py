"""The bridge of microVMs on a real system: whom a guest on it reaches, and whom not.

Guests are processes that hold taps (`support.bridge_guests`); each refusal is seen where it would arrive, or in the
packet filter's counters, and has its twin: the guest's own run answers it.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cloister.plan.bridge import BRIDGE, MAC, MOST_TAPS
from cloister.plan.bridge import UNIT as BRIDGE_UNIT
from support import ether, lan
from support.machines import PYTHON, TESTS, Machine

Make = Callable[..., Machine]
POLICY_FILE = "/etc/cloister/cloister.toml"
POLICY = """\
schema = 1

[microvm]
users = ["alice", "bob"]
"""
SECRET = 2222
"""A port of the host that no guest may reach."""


class Users:
    """A user's process that has guests."""

    def __init__(self, machine: Machine, user: str) -> None:
        """Start it."""
        self.machine = machine
        self.running = machine.popen(
            [PYTHON, "-m", "support.bridge_guests"], user=user, cwd="/", stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": TESTS, "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip

    def __call__(self, do: str, **words: Any) -> Any:
        """Have it do something; return what came of it."""
        assert self.running.stdin
        assert self.running.stdout
        self.running.stdin.write(json.dumps({"do": do, **words}) + "\n")
        self.running.stdin.flush()
        answer = json.loads(self.running.stdout.readline())
        assert "broke" not in answer, answer
        return answer["said"]

    def join(self, name: str) -> dict[str, Any]:
        """Ask for a place, and serve it."""
        tap = self("ask", name=name)
        assert "error" not in tap, (tap, self.machine.journal("cloister-hostd"), self.machine.journal(BRIDGE_UNIT))
        self("serve", name=name, answer=f"PROXY of {name}")
        return dict(tap)

    def close(self) -> None:
        """Kill it."""
        self.running.kill()
        self.running.wait()


@pytest.fixture(scope="module")
def host(suite: str, layers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine with the policy above, a LAN, and a service on every address."""
    with Machine(suite, layers(suite), tmp_path_factory.mktemp(f"bridge-{suite}")) as machine:
        machine.write(POLICY_FILE, POLICY)
        done = machine.run(["cloister", "setup", "--yes"], check=False)
        assert not done.returncode, (done.stderr, machine.journal(BRIDGE_UNIT))
        lan.join(machine)
        serve = (
            "import socket,threading,time\n"
            "def tcp(s):\n while True: s.accept()[0].sendall(b'HOST')\n"
            "def udp(u):\n while True: u.sendto(b'HOST', u.recvfrom(99)[1])\n"
            f"s=socket.create_server(('0.0.0.0',{SECRET})); threading.Thread(target=tcp,args=(s,)).start()\n"
            f"for port in (53,67,{SECRET}):\n u=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\n"
            " u.bind(('0.0.0.0',port)); threading.Thread(target=udp,args=(u,)).start()\n"
        )
        machine.run(["systemd-run", "--quiet", "--unit", "test-services", "/usr/bin/python3", "-c", serve])
        yield machine


@pytest.fixture
def alice(host: Machine) -> Iterator[Users]:
    """A process of alice's with guests; their taps end with it."""
    users = Users(host, "alice")
    yield users
    users.close()


@pytest.fixture
def bob(host: Machine) -> Iterator[Users]:
    """Another user's."""
    users = Users(host, "bob")
    yield users
    users.close()


def counters(machine: Machine) -> dict[str, int]:
    """Return how many packets were refused, by table and counter."""
    listed = json.loads(machine.run(["nft", "-j", "list", "counters"]).stdout)["nftables"]
    found = [item["counter"] for item in listed if "counter" in item and item["counter"]["table"] == "cloister_vm"]
    return {f"{one['family']} {one['name']}": one["packets"] for one in found}


def test_a_guest_reaches_its_own_run_and_nothing_else_of_the_host(host: Machine, alice: Users, bob: Users) -> None:
    """No other port, run, address of the host, LAN or internet; over TCP and UDP. Its own run answers it."""
    own, other, foreign = alice.join("a"), alice.join("b"), bob.join("c")
    alice("plug", name="a")
    gateway = own["gateway"]
    mine = ["tcp", gateway, own["port"]]
    refused = [
        ["tcp", gateway, other["port"]],
        ["tcp", gateway, foreign["port"]],
        *(["tcp", address, SECRET] for address in (gateway, lan.HOST4, lan.HOST_PUBLIC)),
        *(["udp", gateway, port] for port in (53, 67, SECRET, own["port"])),
        ["tcp", other["address"], SECRET],
        ["tcp", foreign["address"], 80],
        *(["tcp", address, 80] for address in (*lan.LAN4, *lan.METADATA[:1], lan.PUBLIC[0])),
    ]

    said = alice("connect", name="a", targets=[mine, *refused, mine])

    assert (said[0], said[-1]) == ("PROXY of a", "PROXY of a")
    assert set(said[1:-1]) == {"silence"}, list(zip(refused, said[1:-1], strict=True))
    assert alice("peers", name="a") == [own["address"]] * 2
    assert (alice("peers", name="b"), bob("peers", name="c")) == ([], [])
    assert alice("here", targets=[["tcp", lan.HOST4, SECRET], ["tcp", "127.0.0.1", SECRET]]) == ["HOST", "HOST"]


def attacks(own: dict[str, Any], other: dict[str, Any]) -> dict[str, bytes]:
    """Return frames that must go nowhere."""
    me, you, gateway, port = own["mac"], other["mac"], own["gateway"], own["port"]
    ends = own["address"], gateway
    syn = ether.tcp(*ends, port)
    to_own = ether.ipv4(*ends, 6, syn)
    huge = ether.ipv4(*ends, 17, ether.udp(SECRET, bytes(60000)))
    multicast = ether.ipv4(own["address"], "224.0.0.251", 17, ether.udp(5353, b"?"))
    as_other = ether.ipv4(other["address"], gateway, 6, ether.tcp(other["address"], gateway, other["port"]))
    to_other = ether.ipv4(own["address"], other["address"], 6, ether.tcp(own["address"], other["address"], 80))
    solicitation = ether.ipv6("fe80::1", "ff02::1", 58, b"\x86" + bytes(15))
    ping = ether.ipv4(own["address"], gateway, 1, b"\x08" + bytes(7))
    dhcp = ether.ipv4("0.0.0.0", "255.255.255.255", 17, ether.udp(67, bytes(240), 68))  # noqa: S104  # DHCP's own
    offer = ether.ipv4(gateway, "255.255.255.255", 17, ether.udp(68, bytes(240), 67))
    return {
        "unicast to another guest": ether.frame(you, me, ether.IPV4, to_other),
        "broadcast": ether.frame(ether.BROADCAST, me, ether.IPV4, to_other),
        "ARP for another guest": ether.arp(me, own["address"], other["address"]),
        "ARP reply to another guest": ether.arp(me, gateway, other["address"], operation=2, to=you, of=you),
        "gratuitous ARP for the gateway": ether.arp(me, gateway, gateway),
        "gratuitous ARP reply for the gateway": ether.arp(me, gateway, gateway, operation=2),
        "ARP with another's MAC inside": ether.arp(me, own["address"], gateway, inner=you),
        "ARP with another's address": ether.arp(me, other["address"], gateway),
        "ARP reply to the host": ether.arp(me, own["address"], gateway, operation=2, to=MAC, of=MAC),
        "spoofed MAC": ether.frame(MAC, you, ether.IPV4, to_own),
        "the gateway's MAC": ether.frame(MAC, MAC, ether.IPV4, to_own),
        "spoofed address": ether.frame(MAC, me, ether.IPV4, as_other),
        "spoofed MAC and address": ether.frame(MAC, you, ether.IPV4, as_other),
        "IPv6 router advertisement": ether.frame("33:33:00:00:00:01", me, ether.IPV6, solicitation),
        "IPv6 to another guest": ether.frame(you, me, ether.IPV6, ether.ipv6("fe80::1", "fe80::2", 58, bytes(16))),
        "a VLAN tag": ether.tagged(ether.frame(MAC, me, ether.IPV4, to_own)),
        "a VLAN tag to another guest": ether.tagged(ether.frame(you, me, ether.IPV4, to_other)),
        "a priority tag": ether.tagged(ether.frame(MAC, me, ether.IPV4, to_own), 0),
        "two tags": ether.tagged(ether.tagged(ether.frame(MAC, me, ether.IPV4, to_own))),
        "DHCP": ether.frame(ether.BROADCAST, me, ether.IPV4, dhcp),
        "a DHCP server": ether.frame(ether.BROADCAST, me, ether.IPV4, offer),
        "a ping": ether.frame(MAC, me, ether.IPV4, ping),
        "a first fragment": ether.frame(MAC, me, ether.IPV4, ether.ipv4(*ends, 6, syn, fragment=0x2000)),
        "a later fragment": ether.frame(MAC, me, ether.IPV4, ether.ipv4(*ends, 6, syn, fragment=3)),
        "an oversized frame": ether.frame(you, me, ether.IPV4, ether.ipv4(*ends, 17, bytes(9000))),
        "an oversized frame to the host": ether.frame(MAC, me, ether.IPV4, huge),
        "a frame of another protocol": ether.frame(you, me, 0x88B5, bytes(60)),
        "spanning tree": ether.frame("01:80:c2:00:00:00", me, 38, bytes(60)),
        "a multicast": ether.frame("01:00:5e:00:00:fb", me, ether.IPV4, multicast),
    }  # fmt: skip


def test_no_frame_gets_anywhere_else(alice: Users, bob: Users, host: Machine) -> None:
    """Whatever a guest writes to its device, nothing of it gets to another guest or the host; its own traffic does."""
    own, other = alice.join("a"), bob.join("c")
    bob("heard", name="c")
    for name, attack in attacks(own, other).items():
        before = counters(host)
        assert alice("send", name="a", frames=[attack.hex()]) == ["sent"], name
        assert alice("heard", name="a", seconds=0.02) == [], name
        assert bob("heard", name="c", seconds=0.05) == [], name
        after = counters(host)
        dropped = after["bridge from_guests"] - before["bridge from_guests"]
        assert dropped == 1 or name == "spanning tree", (name, before, after)  # which no bridge forwards
    assert (alice("peers", name="a"), bob("peers", name="c")) == ([], [])

    alice("send", name="a", frames=[ether.arp(own["mac"], own["address"], own["gateway"]).hex()])
    (reply,) = alice("heard", name="a")
    assert bytes.fromhex(reply)[6:12] == ether.mac(MAC)
    syn = ether.ipv4(own["address"], own["gateway"], 6, ether.tcp(own["address"], own["gateway"], own["port"]))
    alice("send", name="a", frames=[ether.frame(MAC, own["mac"], ether.IPV4, syn).hex()])
    assert bytes.fromhex(alice("heard", name="a")[0])[47] == 0x12, "SYN and ACK"
    assert bob("heard", name="c", seconds=0.05) == []


def test_nobody_else_reaches_a_run_by_its_listener(alice: Users, bob: Users, host: Machine) -> None:
    """Programs of the host, also the user's own, and the LAN do not get to a proxy by the bridge's address."""
    own = alice.join("a")
    alice("plug", name="a")
    target = ["tcp", own["gateway"], own["port"]]

    assert (bob("here", targets=[target]), alice("here", targets=[target])) == (["silence"], ["silence"])
    far = f"nsenter --target $(systemctl show --value -p MainPID {lan.FAR}) --net"
    route = f"{far} ip route replace {own['gateway']}/32 via {lan.HOST4}"
    code = f'import socket; socket.create_connection(("{own["gateway"]}", {own["port"]}), 1)'
    done = host.run(["sh", "-c", f"{route}; {far} /usr/bin/python3 -c '{code}'"], check=False)
    assert "timed out" in done.stderr
    assert alice("peers", name="a") == []
    assert bob("here", targets=[["tcp", own["address"], 18789]]) == ["silence"], "a guest's own ports are no host's"
    assert alice("connect", name="a", targets=[target]) == ["PROXY of a"]


def test_who_takes_a_runs_port_later_is_not_heard(alice: Users, bob: Users) -> None:
    """When a broker is gone and its guest not yet, another user's socket on that port does not become its proxy."""
    own, twin = alice.join("a"), alice.join("b")
    alice("plug", name="a")
    alice("plug", name="b")
    alice("drop_listener", name="a")
    time.sleep(0.1)

    assert bob("bind", address="0.0.0.0", port=own["port"]) == "bound"  # noqa: S104  # an impostor
    assert alice("connect", name="a", targets=[["tcp", own["gateway"], own["port"]]]) == ["silence"]
    assert alice("here", targets=[["tcp", "127.0.0.1", own["port"]]]) == ["IMPOSTOR"]
    assert alice("connect", name="b", targets=[["tcp", twin["gateway"], twin["port"]]]) == ["PROXY of b"]


def test_a_tap_ends_with_its_descriptor_and_leaves_nothing(alice: Users, host: Machine) -> None:
    """Also when its holder is killed: interface, place in the filter, neighbour and record are gone."""
    own = alice.join("a")
    assert own["name"] in host.run(["ip", "-o", "link"]).stdout
    assert own["address"] in host.run(["ip", "neigh"]).stdout
    alice.close()

    host.wait_for(f"! ls /run/cloister/bridge/taps | grep -q {own['name']}$")
    left = host.run(["sh", "-c", "ip -o link; ip neigh; bridge fdb; nft list ruleset"]).stdout
    assert not [word for word in (own["name"], own["address"], own["mac"]) if word in left]


def test_hostd_killed_while_it_makes_a_tap(alice: Users, host: Machine) -> None:
    """A killed hostd, at any moment, leaves no guest that nobody has; the next request is answered."""
    for number, wait in enumerate((0.0, 0.01, 0.02)):
        killing = host.popen(["sh", "-c", f"sleep {0.05 + wait}; systemctl kill --signal=KILL cloister-hostd.service"])
        time.sleep(0.05)
        alice("ask", name=f"a{number}")
        killing.wait()
        host.run(["systemctl", "reset-failed", "cloister-hostd.service"], check=False)
    names = set(host.run(["ls", "/run/cloister/bridge/taps"]).stdout.split())
    links = {one.split(": ")[1] for one in host.run(["ip", "-o", "link"]).stdout.splitlines() if "clvm" in one}
    assert {one.partition("@")[0] for one in links} >= names
    assert alice.join("b")["gateway"]


def test_a_tap_that_its_holder_changes_is_deleted(alice: Users, bob: Users, host: Machine) -> None:
    """A tap made persistent, or given another guest's MAC to take what is sent there, goes; others are not troubled."""
    for how in ("persist", "mac", "gateway"):
        own, foreign = alice.join("a"), bob.join("c")
        alice("plug", name="a")
        taken = MAC if how == "gateway" else own["mac"]
        assert bob("tamper", name="c", how="persist" if how == "persist" else "mac", mac=taken) == "done"
        before = bob("heard", name="c", seconds=0.0)
        if how == "persist":
            host.run(["ip", "link", "set", foreign["name"], "down"], check=False)  # anything that is news
        known = f"bridge fdb | grep -q '{own['mac']} dev {own['name']}.*static'"
        host.wait_for(f"! ip link show {foreign['name']} && {known}")
        target = ["tcp", own["gateway"], own["port"]]
        assert alice("connect", name="a", targets=[target]) == ["PROXY of a"]
        assert before == []
        for users, name in ((alice, "a"), (bob, "c")):
            users("close", name=name)


def test_whoever_has_no_grant_gets_no_tap(host: Machine) -> None:
    """A user that the policy does not name is refused, with what its owner types; so is an odd request."""
    host.run(["useradd", "--create-home", "carol"], check=False)
    carol = Users(host, "carol")
    refused = carol("ask", name="x")
    carol.close()

    assert refused["error"] == "tap-refused"
    assert "bridge-not-granted" in refused["text"] or "may not connect" in refused["text"]


ODD = """
import json, os, socket, sys
from cloister.host.frames import encode_list
from support.hostd_client import answers, connect
gateway = json.load(open("/run/cloister/bridge/network.json"))["network"].replace(".0/24", ".1")
def listening(address, kind=socket.SOCK_STREAM):
    sock = socket.socket(socket.AF_INET, kind); sock.bind((address, 0))
    if kind == socket.SOCK_STREAM: sock.listen()
    return sock
idle = socket.socket(); idle.bind((gateway, 0))
six = socket.socket(socket.AF_INET6); six.bind(("::", 0)); six.listen()
unix = socket.socket(socket.AF_UNIX); unix.bind("\\0bridge-test"); unix.listen()
good = listening(gateway)
cases = {
    "any address": (["run=r1"], [listening("0.0.0.0")]),
    "loopback": (["run=r1"], [listening("127.0.0.1")]),
    "not listening": (["run=r1"], [idle]),
    "UDP": (["run=r1"], [listening(gateway, socket.SOCK_DGRAM)]),
    "IPv6": (["run=r1"], [six]),
    "a Unix socket": (["run=r1"], [unix]),
    "a file": (["run=r1"], [open("/etc/passwd")]),
    "none": (["run=r1"], []),
    "two": (["run=r1"], [good, good]),
    "no run": ([], [good]),
    "an odd run": (["run=../x"], [good]),
    "a user": (["run=r1", "user=bob"], [good]),
    "a port": (["run=r1", "port=22"], [good]),
    "an address": (["run=r1", "address=10.0.0.1"], [good]),
}
talks, found = {}, {}
for name, (fields, sockets) in cases.items():
    talks[name] = connect()
    described = tuple(one.fileno() for one in sockets)
    talks[name].send("L", encode_list(field.encode() for field in ["verb=tap", *fields]), described)
for name, talk in talks.items():
    found[name] = answers(talk)
talk = connect()
talk.send("L", encode_list([b"verb=tap", b"run=r1"]), (good.fileno(),))
found["twin"] = answers(talk)
print(json.dumps(found))
"""


def test_the_floor_under_a_tap(host: Machine) -> None:
    """A listener that is not on the bridge alone, odd descriptors, further fields: refused; a good one not."""
    environment = {"PYTHONPATH": TESTS, "PYTHONDONTWRITEBYTECODE": "1"}
    done = host.run([PYTHON, "-c", ODD], user="alice", cwd="/", env=environment)
    found = json.loads(done.stdout)

    ((kind, twin),) = found.pop("twin")
    assert (kind, twin["uid"]) == ("J", int(host.run(["id", "-u", "alice"]).stdout))
    assert {name: [each for each, _ in answer] for name, answer in found.items()} == {name: ["F"] for name in found}
    host.wait_for("! ls /run/cloister/bridge/taps | grep -q .")


@pytest.mark.slow
def test_a_quota_of_guests_for_each_user(alice: Users, bob: Users, host: Machine) -> None:
    """The 65th guest of a user is refused; another user still gets one, and no two have an address or MAC in common."""
    taps = [alice("ask", name=f"g{number}") for number in range(MOST_TAPS)]
    refused = alice("ask", name="more")
    other = bob.join("c")

    assert "64 guests" in refused["text"]
    for field in ("name", "mac", "address", "own_mac"):
        assert len({tap[field] for tap in (*taps, other)}) == MOST_TAPS + 1
    alice("close", name="g0")
    host.wait_for(f"! ls /run/cloister/bridge/taps | grep -q {taps[0]['name']}$")
    assert "error" not in alice("ask", name="more")


def test_a_flushed_filter_is_loaded_again_with_its_guests(alice: Users, bob: Users, host: Machine) -> None:
    """Whoever flushes the packet filter, or adds to it: the bridge is down until it is whole, then guests go on."""
    own, other = alice.join("a"), bob.join("c")
    alice("plug", name="a")
    mine, *others = (["tcp", own["gateway"], port] for port in (own["port"], SECRET, other["port"]))
    for change in (
        "nft flush ruleset",
        "nft delete table bridge cloister_vm",
        "nft insert rule inet cloister_vm input accept",
        f"nft add element inet cloister_vm reaches {{ {own['address']} . {own['gateway']} . {SECRET} }}",
        f"ip link set {BRIDGE} down",
    ):
        host.run(["sh", "-c", change])
        known = f"nft list table bridge cloister_vm | grep -q {own['name']}"
        host.wait_for(f"ip link show {BRIDGE} | grep -q ,UP && {known}")
        time.sleep(0.3)
        assert alice("connect", name="a", targets=[mine]) == ["PROXY of a"], change
    assert alice("connect", name="a", targets=[mine, *others]) == ["PROXY of a", "silence", "silence"]
    assert "is up again" in host.journal(BRIDGE_UNIT)


def test_without_its_daemon_the_bridge_is_down(alice: Users, host: Machine) -> None:
    """While nobody watches, the bridge is down: after SIGKILL for a moment, when it is stopped until it is started."""
    own = alice.join("a")
    alice("plug", name="a")
    targets = [["tcp", own["gateway"], own["port"]], ["tcp", own["gateway"], SECRET]]
    host.run(["systemctl", "kill", "--signal=KILL", BRIDGE_UNIT])
    host.wait_for(f"! systemctl is-active --quiet {BRIDGE_UNIT} || ip link show {BRIDGE} | grep -q ,UP")
    host.wait_for(f"systemctl is-active --quiet {BRIDGE_UNIT}")
    assert alice("connect", name="a", targets=targets) == ["PROXY of a", "silence"]

    host.run(["systemctl", "stop", BRIDGE_UNIT])
    host.run(["nft", "flush", "ruleset"])
    assert alice("connect", name="a", targets=targets) == ["silence", "silence"]
    host.run(["systemctl", "start", BRIDGE_UNIT])
    assert alice("connect", name="a", targets=targets) == ["PROXY of a", "silence"]


def test_a_network_that_is_met_later_is_told_and_left_when_guests_have_gone(alice: Users, host: Machine) -> None:
    """A host that gets the bridge's network elsewhere says so in its status; guests go on until they leave."""
    own = alice.join("a")
    alice("plug", name="a")
    # The half in which the guest is not: to its own the host's routes would lead elsewhere now.
    half = "10.0.0.100/25" if int(own["address"].rpartition(".")[2]) >= 128 else "10.0.0.200/25"
    try:
        for words in ("link add met type veth peer name tem", f"address add {half} dev met", "link set met up"):
            host.run(["ip", *words.split()])
        host.wait_for("cloister status | grep -q 'it moves when no guest is there'")
        assert alice("connect", name="a", targets=[["tcp", own["gateway"], own["port"]]]) == ["PROXY of a"]
        alice("close", name="a")
        host.wait_for(f"ip address show {BRIDGE} | grep -q 10.77.0.1/24")
    finally:
        host.run(["ip", "link", "delete", "met"])
    host.wait_for(f"ip address show {BRIDGE} | grep -q 10.0.0.1/24")


def test_setup_collision_reboot_and_uninstall(fresh_machine: Make) -> None:
    """Made at setup and at each boot; in another network where this one is the host's; gone when uninstalled."""
    machine = fresh_machine()
    for words in ("link add lan1 type veth peer name lan2", "address add 10.0.0.77/20 dev lan1", "link set lan1 up"):
        machine.run(["ip", *words.split()])
    machine.write(POLICY_FILE, POLICY)
    shown = machine.run(["cloister", "setup", "--dry-run"]).stdout
    assert "cloister-bridge.service" in shown
    assert not machine.run(["ip", "link", "show", BRIDGE], check=False).stdout
    machine.run(["cloister", "setup", "--yes"])

    assert "10.77.0.1/24" in machine.run(["ip", "address", "show", BRIDGE]).stdout
    moved = "10.77.0.0/24 instead of 10.0.0.0/24, where this host has 10.0.0.0/20"
    for said in (machine.journal(BRIDGE_UNIT), machine.run(["cloister", "status"]).stdout):
        assert moved in said
    assert moved in machine.run(["cloister", "doctor"], user="alice", check=False).stdout
    assert "forwarding off" in machine.run(["ip", "-4", "netconf", "show", "dev", BRIDGE]).stdout
    assert "inet6" not in machine.run(["ip", "address", "show", BRIDGE]).stdout
    machine.run(["ip", "link", "delete", "lan1"])
    machine.wait_for(f"ip address show {BRIDGE} | grep -q 10.0.0.1/24")

    machine.reboot()
    assert "10.0.0.1/24" in machine.run(["ip", "address", "show", BRIDGE]).stdout
    users = Users(machine, "alice")
    own = users.join("a")
    machine.run(["cloister", "uninstall", "--yes"])
    left = machine.run(["sh", "-c", "ip -o link; nft list ruleset; systemctl list-unit-files"]).stdout
    assert not [word for word in (BRIDGE, "cloister_vm", own["name"], BRIDGE_UNIT) if word in left]
    assert not machine.path("/var/lib/cloister/bridge.nft").exists()
    users.close()


def test_without_a_bridge_it_is_said_what_to_type(machine: Machine) -> None:
    """A system that root has not set up for it refuses, and says how."""
    users = Users(machine, "alice")
    refused = users("ask", name="a")
    users.close()

    assert refused["error"] == "bridge-needs-setup"
    assert "sudo cloister setup" in refused["remedy"]
