"""The watchdog of the packet filter: what happens when somebody takes the table away."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator

import pytest

from cloister.egress.addresses import Guard
from cloister.egress.nft_units import AccountRules, ruleset
from cloister.isolation.firewall_units import BOUND, firewall_unit, watchdog_unit
from cloister.plan.firewall import FIREWALL_UNIT, WATCHDOG_UNIT
from cloister.plan.unit import FIRST_UID
from support import lan
from support.machines import PYTHON, Machine

WEB = FIRST_UID + 1
PROBE = ["/usr/bin/python3", "/srv/tests/support/net_probe.py"]
INSTALL = "import sys; from cloister.host import firewall; firewall.install(sys.stdin.read())"
SHARING, APART = "cloister-run-sharing.service", "cloister-run-apart.service"
SOON_S = 1.0
"""What was asked for; some 40 ms on an idle machine."""


@pytest.fixture(scope="module")
def host(suite: str, layers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine with the packet filter and its watchdog, as they are installed."""
    with Machine(suite, layers(suite), tmp_path_factory.mktemp(f"watchdog-{suite}")) as machine:
        machine.run(["mkdir", "-p", "/var/lib/cloister", "/run/cloister"])
        machine.run(["useradd", "--uid", str(WEB), "--no-create-home", "--shell", "/usr/sbin/nologin", "cl-web-alice"])
        lan.join(machine)
        machine.write(f"/etc/systemd/system/{FIREWALL_UNIT}", firewall_unit("/usr/sbin/nft"))
        machine.write(f"/etc/systemd/system/{WATCHDOG_UNIT}", watchdog_unit(PYTHON))
        install(machine)
        machine.run(["systemctl", "enable", "--now", FIREWALL_UNIT, WATCHDOG_UNIT])
        yield machine


def install(host: Machine, *more: AccountRules) -> None:
    """Install a table as `cloister apply` does."""
    host.run([PYTHON, "-c", INSTALL], input=ruleset([AccountRules("cl-web-alice", WEB, Guard()), *more]))


@pytest.fixture
def units(host: Machine) -> Iterator[None]:
    """One unit that shares the host's network, and one with a network namespace of its own."""
    host.run(["systemctl", "reset-failed"])
    host.run(["systemctl", "start", WATCHDOG_UNIT])
    start(host, SHARING, *BOUND)
    start(host, APART, ("PrivateNetwork", "yes"))
    yield
    host.run(["systemctl", "stop", SHARING, APART], check=False)
    host.wait_for(f"! systemctl list-units --all --plain --no-legend {SHARING} {APART} | grep -q .")


def start(host: Machine, unit: str, *properties: tuple[str, str]) -> None:
    """Start a unit of a long-lived agent."""
    named = (("User", "cl-web-alice"), ("Type", "exec"), *properties)
    flags = [word for name, value in named for word in ("-p", f"{name}={value}")]
    host.run(["systemd-run", "--quiet", "--collect", f"--unit={unit}", *flags, "sleep", "1000"])


def active(host: Machine, unit: str) -> bool:
    """Say whether a unit runs."""
    return host.show(unit, "ActiveState") == "active"


def whole(host: Machine) -> bool:
    """Say whether the kernel's table is what the file says."""
    code = "from cloister.host import firewall; print(firewall.trouble())"
    return str(host.run([PYTHON, "-c", code]).stdout) == "\n"


def lan_refused(host: Machine) -> bool:
    """Say whether the agent's uid is refused an address of the LAN."""
    target = f"tcp:{lan.LAN4[0]}:80"
    done = host.run(["setpriv", f"--reuid={WEB}", "--clear-groups", *PROBE, target])
    return json.loads(done.stdout)[target][0] == "ECONNREFUSED"


def ended_within(host: Machine, unit: str, limit_s: float = 10.0) -> float:
    """Return how long it took until a unit was not running any more."""
    began = time.monotonic()
    while host.show(unit, "MainPID") not in {"", "0"}:
        assert time.monotonic() - began < limit_s, f"{unit} still runs"
    return time.monotonic() - began


def incidents(host: Machine) -> int:
    """Return how often the watchdog has raised an alarm."""
    return host.journal(WATCHDOG_UNIT).count("stopping what shares the host's network")


FOREIGN = (
    ["nft", "flush", "ruleset"],
    ["nft", "delete", "table", "inet", "cloister"],
    ["nft", "add", "table", "inet", "cloister", "{ flags dormant; }"],
    ["nft", "insert", "rule", "inet", "cloister", "refuse", "accept"],
)


@pytest.mark.parametrize("change", FOREIGN, ids=lambda words: "-".join(words[1:3]))
@pytest.mark.usefixtures("units")
def test_a_foreign_change_stops_what_shares_the_hosts_network(host: Machine, change: list[str]) -> None:
    """Within a second its processes are gone and the table is back; what has a network of its own lives on."""
    host.run(change)
    took_s = ended_within(host, SHARING)
    host.wait_for("journalctl -b -u cloister-watchdog | tail -1 | grep -q 'whole again'")
    said = host.journal(WATCHDOG_UNIT)
    stopped = re.findall(r"cloister-run-sharing.service stopped within (\d+) ms", said)
    again = re.findall(r"whole again after (\d+) ms", said)

    assert took_s < SOON_S
    assert int(stopped[-1]) < SOON_S * 1000
    assert int(again[-1]) < SOON_S * 1000
    assert active(host, APART)
    assert active(host, WATCHDOG_UNIT)
    assert whole(host)
    assert lan_refused(host)


@pytest.mark.usefixtures("units")
def test_other_tables_are_nobodys_alarm(host: Machine) -> None:
    """A container engine or an administrator may change tables of their own, as often as they like."""
    before = incidents(host)
    for number in range(20):
        host.run(["nft", f"add table ip other{number}; add chain ip other{number} c; delete table ip other{number}"])

    assert active(host, SHARING)
    assert incidents(host) == before


@pytest.mark.usefixtures("units")
def test_our_own_changes_are_no_alarm(host: Machine) -> None:
    """`cloister apply` loads another table while agents run: nothing is stopped, and the new one holds from then on."""
    before = incidents(host)
    for number in range(5):
        install(host, AccountRules("cl-more-alice", WEB + 1 + number))
    assert active(host, SHARING)
    assert incidents(host) == before

    host.run(["nft", "delete", "table", "inet", "cloister"])
    ended_within(host, SHARING)
    host.wait_for("nft list table inet cloister")
    assert f"{WEB + 5} : goto closed" in host.run(["nft", "list", "map", "inet", "cloister", "agents"]).stdout


RENEW = "cp -p /usr/sbin/nft /usr/sbin/nft.new && touch /usr/sbin/nft.new && mv /usr/sbin/nft.new /usr/sbin/nft"


@pytest.mark.usefixtures("units")
def test_a_new_nft_is_no_alarm(host: Machine) -> None:
    """An upgrade of nft may list the same table in other words: what to expect is found out anew, by a reload."""
    before = incidents(host)
    host.run(["sh", "-c", RENEW])
    host.run(["nft", "add chain inet cloister passing; delete chain inet cloister passing"])  # wakes the watchdog
    host.wait_for(f"journalctl -b -u {WATCHDOG_UNIT} | grep -q 'Reloaded'")
    assert active(host, SHARING)
    assert incidents(host) == before

    host.run(["nft", "insert rule inet cloister refuse accept"])
    ended_within(host, SHARING)
    assert incidents(host) == before + 1


@pytest.mark.usefixtures("units")
@pytest.mark.parametrize("how", ["KILL", "TERM", "stop"])
def test_without_its_watchdog_nothing_shares_the_hosts_network(host: Machine, how: str) -> None:
    """However the watchdog ends, what is bound to it ends too; what is not, lives on, and the table stands."""
    if how == "stop":
        host.run(["systemctl", "stop", WATCHDOG_UNIT])
    else:
        host.run(["systemctl", "kill", f"--signal={how}", WATCHDOG_UNIT])
    host.wait_for(f"! systemctl is-active --quiet {SHARING}", timeout=10)

    assert active(host, APART)
    assert lan_refused(host)


def test_without_a_table_nothing_starts_that_shares_the_hosts_network(host: Machine) -> None:
    """A file that does not load ends the watchdog: bound units stop, none starts; a good file mends it by itself."""
    host.run(["systemctl", "start", WATCHDOG_UNIT])
    start(host, SHARING, *BOUND)
    good = host.read("/var/lib/cloister/firewall.nft")
    host.write("/var/lib/cloister/firewall.nft", "table inet cloister { nonsense }\n", mode=0o600)
    host.run(["nft", "flush", "ruleset"])
    ended_within(host, SHARING)
    host.wait_for(f"! systemctl is-active --quiet {WATCHDOG_UNIT}")
    flags = [word for name, value in BOUND for word in ("-p", f"{name}={value}")]
    ran = host.run(["systemd-run", "--quiet", "--collect", *flags, "touch", "/run/test-ran"], check=False)

    assert ran.returncode
    assert not host.path("/run/test-ran").exists()
    host.write("/var/lib/cloister/firewall.nft", good, mode=0o600)
    host.wait_for(f"systemctl is-active --quiet {WATCHDOG_UNIT}")
    assert whole(host)
    assert lan_refused(host)


def test_reloading_nftables_does_not_leave_it_open(host: Machine) -> None:
    """Debian's nftables.service begins with `flush ruleset`: after a restart or reload our table is there again."""
    host.run(["systemctl", "start", WATCHDOG_UNIT])
    for verb in ("restart", "reload"):
        host.run(["systemctl", verb, "nftables.service"])
        host.wait_for("nft list table inet cloister")
        assert whole(host)
        assert lan_refused(host)
    host.run(["systemctl", "stop", "nftables.service"])
    host.wait_for("nft list table inet cloister")
    assert lan_refused(host)
