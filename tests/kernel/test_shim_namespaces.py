"""User, mount and network namespaces of the outer half: overlays, rules, and the wait for go."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from shim_rig import NETNS, USERNS, Rig, Run, family, rig_of_test, wait_gone

from cloister.host import frames

pytestmark = pytest.mark.kernel
rig = pytest.fixture(rig_of_test)

RULES = b"""table inet cloister {
    chain output { type filter hook output priority 0; policy accept;
        ip daddr 127.0.0.0/8 accept
        ip daddr 192.0.2.0/24 meta l4proto tcp reject with tcp reset
    }
}
"""


INTERFACE = (
    "link set lo up",
    "link add eth0 type veth peer name eth1",
    "address add 198.51.100.1/24 dev eth0",
    "link set eth0 up",
    "link set eth1 up",
    "route add default dev eth0",
)
SHARED_NETWORK = (
    "/usr/bin/bwrap --unshare-user --unshare-pid --unshare-ipc --unshare-uts --die-with-parent --as-pid-1"
    " --ro-bind / / --proc /proc --dev /dev --seccomp 4 --cap-drop ALL --"
)


def overlay(rig: Rig, *names: str) -> list[str]:
    """Make directories for one overlay, owned by the user who runs."""
    for name in names:
        path = rig.directory / name
        path.mkdir(mode=0o755)
        if os.getuid() == 0:
            os.chown(path, 4242, 4242)
    return [str(rig.directory / name) for name in names]


def test_an_overlay_keeps_changes_aside(rig: Rig) -> None:
    """The agent sees and changes the view; the lower directory stays as it was; odd names are no problem."""
    fields = overlay(rig, "low:er,a\\b", "upper,x=y", "work:dir", "target")
    Path(fields[0], "old").write_text("old")
    Path(fields[0], "gone").write_text("gone")
    for path in Path(fields[0]).iterdir():
        if os.getuid() == 0:
            os.chown(path, 4242, 4242)  # overlayfs copies up only what has an owner in the user namespace
    argv = ["/usr/bin/bwrap", "--unshare-all", "--as-pid-1", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
    argv += ["--bind", fields[3], fields[3], "--seccomp", "4", "--cap-drop", "ALL", "--", str(rig.shim), "inner"]
    argv += ["--ctl", "3", "--egress", str(rig.relay.path)]
    run = Run(rig, flags=USERNS, overlays=fields, argv=argv)
    script = "echo new >> old; echo made > made; rm gone; cat old; ls; id -u"
    code, out, err = run.complete("sh", "-c", script, cwd=fields[3])
    uid = b"4242" if os.getuid() == 0 else str(os.getuid()).encode()
    assert (code, out, err) == (0, b"oldnew\nmade\nold\n" + uid + b"\n", b"")
    assert Path(fields[0], "old").read_text() == "old"
    assert Path(fields[0], "gone").exists()
    assert Path(fields[1], "old").read_text() == "oldnew\n"
    assert Path(fields[1], "made").read_text() == "made\n"
    assert not list(Path(fields[3]).iterdir())
    assert fields[3] not in Path("/proc/self/mounts").read_text()


def test_a_broken_overlay_ends_the_run(rig: Rig) -> None:
    """What cannot be mounted is 125 with the reason; nothing is started."""
    fields = overlay(rig, "lower", "upper", "aside", "target")
    run = Run(rig, flags=USERNS, overlays=[*fields[:3], str(rig.directory / "missing")])
    assert run.process.wait(5) == 125
    assert b"cannot mount the overlay: No such file" in run.process.stderr.read()
    run.close()
    run = Run(rig, overlays=fields)
    assert run.process.wait(5) == 125
    assert b"outside a mount namespace" in run.process.stderr.read()
    run.close()


def net_run(rig: Rig, *, probe: bool = True, **options: object) -> Run:
    """Start a run that shares the network namespace of the outer half."""
    argv = [*SHARED_NETWORK.split(), str(rig.shim), "inner", "--ctl", "3", "--egress", str(rig.relay.path)]
    argv += ["--probe-connect", "192.0.2.1:9"] if probe else []
    return Run(rig, flags=USERNS | NETNS, argv=argv, **options)


def serve(pid: int) -> None:
    """Give the namespaces of the outer half an interface and a default route, as the broker does with pasta.

    By hand, and so by root: `/dev/net/tun` may be root's alone, and pasta would drop root.
    """
    for words in INTERFACE:
        subprocess.run(["nsenter", "-n", "-t", str(pid), "ip", *words.split()], check=True)


@pytest.mark.root
def test_the_namespace_waits_for_go(rig: Rig) -> None:
    """`N` names a process whose namespaces the user can enter; bubblewrap starts after `G` only."""
    run = net_run(rig, probe=False)
    pid = frames.decode_u32(run.until("outer", "N"))[0]
    assert pid == run.process.pid
    assert Path(f"/proc/{pid}/ns/net").stat().st_ino != Path("/proc/self/ns/net").stat().st_ino
    time.sleep(0.1)
    assert len(family(pid)) == 1
    serve(pid)
    run.outer.send("G")
    run.go("sh", "-c", "ip -o link; exit 3")
    assert run.wait() == 3
    assert run.process.stdout.read().count(b",UP") >= 2
    run.close()


def test_a_lost_broker_instead_of_go_starts_nothing(rig: Rig) -> None:
    """EOF is not go: nothing was started, and the namespaces vanish with us."""
    run = net_run(rig)
    run.until("outer", "N")
    members = family(run.process.pid)
    run.outer.close()
    assert run.process.wait(5) == 125
    assert not wait_gone(members)
    run.close()


@pytest.mark.root
def test_rules_stand_before_the_namespace_is_served(rig: Rig) -> None:
    """Nft runs inside before `N`; its rules refuse what they name and pass the rest; the agent cannot change them."""
    run = net_run(rig, nft=["/usr/sbin/nft", "-f", "/dev/fd/5"], nft_text=RULES)
    pid = frames.decode_u32(run.until("outer", "N"))[0]
    serve(pid)
    run.outer.send("G")
    run.go("sh", "-c", "/usr/sbin/nft flush ruleset; ip link set lo down; exit 5")
    assert run.wait() == 5
    assert "connect:192.0.2.1:9=denied" in run.probe
    assert run.process.stderr.read().count(b"not permitted") == 2
    run.close()


@pytest.mark.root
def test_a_served_namespace_without_rules_stops_the_run(rig: Rig) -> None:
    """Attack: the rules are missing. What is then not refused shows in the probe, and the agent does not run."""
    run = net_run(rig)
    serve(frames.decode_u32(run.until("outer", "N"))[0])
    run.outer.send("G")
    run.go("true")
    assert run.wait() == 125
    assert "connect:192.0.2.1:9=allowed" in run.probe
    run.close()


def test_rules_that_do_not_load_end_the_run(rig: Rig) -> None:
    """No rules, no namespace: 125, and the broker is never told to serve it."""
    run = net_run(rig, nft=["/usr/sbin/nft", "-f", "/dev/fd/5"], nft_text=b"not rules")
    assert run.process.wait(5) == 125
    assert b"cannot load the nft rules" in run.process.stderr.read()
    run.turn()
    assert not [seen for seen in run.seen if seen[1] == "N"]
    run.close()
