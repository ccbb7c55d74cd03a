"""The system's keeper tells the owner of a run to stop it: over a real socket, to those who may own it, and obeyed."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.audit.chain import encode
from cloister.audit.event import Endpoint, Event
from cloister.host.audit_send import Sender
from cloister.runs.audit_detections import Order
from cloister.runs.audit_sinks import SystemSink
from support.listening import await_socket

pytestmark = pytest.mark.kernel
try:
    ME = pwd.getpwuid(os.getuid()).pw_name
except KeyError:  # the keeper's own name for somebody without one
    ME = f"user{os.getuid()}"
POLICY = """
schema = 1
[[audit.rules]]
name = "no-production"
title = "production was asked for"
kinds = ["egress"]
hosts = ["*.prod.example.com"]
action = "stop"
"""


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Path]:
    """Start the system's keeper as this user; return the folder with its socket, log and policy."""
    policy = tmp_path / "cloister.toml"
    policy.write_text(POLICY)
    policy.chmod(0o600)
    words = ["--socket", tmp_path / "s", "--log", tmp_path / "log", "--keys", tmp_path / "keys", "--policy", policy]
    process = subprocess.Popen([sys.executable, "-m", "cloister.services.auditd", *map(str, words)])
    try:
        await_socket(tmp_path / "s")
        yield tmp_path
    finally:
        process.terminate()
        process.wait(10)


def asked(host: str) -> bytes:
    """Return the event of a host that was asked for."""
    endpoint = Endpoint(hostname=host)
    return encode(Event(time=time.time_ns(), kind="egress.decided", run="1aaaaaaaaaaa", user=ME, endpoint=endpoint))


def ordered(sink: SystemSink, orders: list[Order], count: int) -> None:
    """Wait until so many orders have come, three seconds at most."""
    until = time.monotonic() + 3
    while len(orders) < count and time.monotonic() < until:
        sink.idle()
        time.sleep(0.05)


def test_a_detection_of_the_system_stops_a_run(keeper: Path) -> None:
    """The broker of the person hears which run, and by which rule; what matches nothing orders nothing."""
    orders: list[Order] = []
    sink = SystemSink(str(keeper / "s"), ordered=orders.append)
    sink.write([asked("docs.example.com")])
    ordered(sink, orders, 1)
    assert not orders
    sink.write([asked("db.prod.example.com")])
    ordered(sink, orders, 1)
    sink.close()

    assert orders == [Order("1aaaaaaaaaaa", ME, "no-production", "production was asked for")]


def test_a_changed_policy_is_obeyed_without_a_restart(keeper: Path) -> None:
    """A rule that is taken out orders nothing any more; one with a mistake is said in the log."""
    policy = keeper / "cloister.toml"
    orders: list[Order] = []
    sink = SystemSink(str(keeper / "s"), ordered=orders.append)
    sink.write([asked("docs.example.com")])  # it answers, so it has read its policy
    policy.write_text(POLICY.replace('"egress"', '"egres"'))
    time.sleep(2.2)
    sink.write([asked("db.prod.example.com")])
    ordered(sink, orders, 1)
    assert len(orders) == 1
    assert "not in force" in "".join(path.read_text() for path in keeper.glob("log/*.jsonl"))
    policy.write_text("schema = 1\n")
    time.sleep(2.2)
    sink.write([asked("db.prod.example.com")])
    time.sleep(0.5)
    sink.idle()
    sink.close()

    assert len(orders) == 1


def test_a_sender_that_knows_no_orders_is_not_disturbed(keeper: Path) -> None:
    """Orders between two confirmations lose none of them."""
    sender = Sender(str(keeper / "s"))
    for _ in range(5):
        sender.send([asked("db.prod.example.com")])
    sender.close()

    assert len(sender.orders) >= 1


LISTEN = """
import sys, time
from cloister.runs.audit_sinks import SystemSink
orders = []
sink = SystemSink(sys.argv[1], ordered=orders.append)
sink.write([sys.argv[2].encode() + b"\\n"])
until = time.monotonic() + float(sys.argv[3])
while time.monotonic() < until and not orders:
    sink.idle()
    time.sleep(0.05)
print([order.user for order in orders], flush=True)
"""


@pytest.mark.root
def test_a_stranger_hears_no_orders() -> None:
    """Of two people who report, only the one whose run is meant is told to stop it; root, who may own it, too."""
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        place = Path(made)
        place.chmod(0o755)
        policy = place / "cloister.toml"
        policy.write_text(POLICY)
        policy.chmod(0o600)
        words = ["--socket", place / "s", "--log", place / "log", "--keys", place / "keys", "--policy", policy]
        keeper = subprocess.Popen([sys.executable, "-m", "cloister.services.auditd", *map(str, words)])
        try:
            await_socket(place / "s")
            listeners = [listen(place / "s", uid, "docs.example.com", 6.0) for uid in (61001, 0)]
            time.sleep(1)
            own = listen(place / "s", 61002, "db.prod.example.com", 6.0)
            heard = [one.communicate(timeout=30)[0].strip() for one in (own, *listeners)]
        finally:
            keeper.terminate()
            keeper.wait(10)
    assert heard == ["['user61002']", "[]", "['user61002']"]


def listen(place: Path, uid: int, host: str, seconds: float) -> subprocess.Popen[str]:
    """Report an event as somebody, and print whose runs they are told to stop; anybody may read the code."""
    source = "\n".join(["import os", f"os.setgroups([]); os.setgid({uid}); os.setuid({uid})", LISTEN])
    # Modules are found while it is still root's: what imports later finds them loaded.
    early = "import cloister.runs.audit_sinks, cloister.audit.chain, cloister.host.audit_send, msgspec\n"
    event = encode(
        Event(time=time.time_ns(), kind="egress.decided", run="1aaaaaaaaaaa", endpoint=Endpoint(hostname=host))
    )
    argv = [sys.executable, "-c", early + source, str(place), event.decode().strip(), str(seconds)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
