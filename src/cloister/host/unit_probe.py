"""Whether this host can give what `isolation = "unit"` needs. Reads and asks; changes nothing and judges nothing."""

from __future__ import annotations

import contextlib
import os
import re
import socket

from cloister.errors import UnsupportedError
from cloister.host import kernel_events, kernel_programs
from cloister.host.frames import encode, encode_list
from cloister.host.probe import probe
from cloister.host.system_probe import unit_states
from cloister.host.taps import read_network
from cloister.plan.bridge import Network
from cloister.plan.facts import Answer
from cloister.plan.firewall import FIREWALL_UNIT
from cloister.plan.system_facts import UnitFacts
from cloister.plan.unit import HOSTD_SOCKET

_IDMAPPED = (5, 12)
_ANSWER_S = 5.0
_HEAD = 5


def take_unit_facts(*, quick: bool) -> UnitFacts:
    """Return the facts; `quick` asks hostd nothing, since that would start it."""
    host = probe()
    numbers = tuple(int(number) for number in re.findall(r"\d+", host.kernel)[:2])
    booted = host.systemd_booted
    network = _network()
    return UnitFacts(
        systemd_booted=booted,
        cgroup_layout=host.cgroup.layout,
        kernel=host.kernel,
        idmapped=numbers >= _IDMAPPED,
        nft=host.nft.path,
        firewall_loaded=booted and unit_states([FIREWALL_UNIT]).get(FIREWALL_UNIT) is not None,
        hostd_there=os.path.exists(HOSTD_SOCKET),
        hostd_answers="unknown" if quick else hostd_answers(),
        bridge=network.describe() if network else "",
        bridge_moved=network is not None and bool(network.taken_by),
        no_kernel_events=kernel_programs.missing() or kernel_events.missing(),
    )


def _network() -> Network | None:
    with contextlib.suppress(UnsupportedError):
        return read_network()
    return None


def hostd_answers(path: str = HOSTD_SOCKET) -> Answer:
    """Ask hostd for something that does not exist; its refusal is the answer that is hoped for."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_ANSWER_S)
        sock.connect(path)
        sock.sendall(encode("L", encode_list([b"verb=none"])))
        sock.shutdown(socket.SHUT_WR)
        head = sock.recv(_HEAD, socket.MSG_WAITALL)
        return "yes" if head[_HEAD - 1 :] == b"F" else "no"
    return "no"
