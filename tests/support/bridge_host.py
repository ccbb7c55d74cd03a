"""A host's bridge of microVMs without a system: in namespaces of its own, hostd's requests served by this process.

`unshare --net --mount python -m support.bridge_host UID` (root): /run and /var/lib are empty there. It says `ready`,
then serves until its standard input ends.
"""

from __future__ import annotations

import os
import pwd
import select
import socket
import subprocess
import sys
from pathlib import Path

import msgspec

from cloister.egress.nft_bridge import ruleset
from cloister.host import bridge, bridge_filter
from cloister.host.rtnetlink import Rtnetlink
from cloister.plan.bridge import DEFAULT_NETWORK, FILE
from cloister.plan.unit import HOSTD_SOCKET, SYSTEM_FILE, System, VmBridge
from cloister.services import hostd_request, hostd_tap

NOBODY = None
"""There is no manager of units here; nothing that is asked needs one."""


def main(uid: int) -> None:
    """Set up, and serve."""
    for place in ("/run", "/var/lib"):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", place], check=True)
    user = _name_of(uid)
    Path(SYSTEM_FILE).parent.mkdir()
    Path(HOSTD_SOCKET).parent.mkdir()
    allowed = System(bridge=VmBridge(network=DEFAULT_NETWORK, users=(user,)), audit="alarm")
    Path(SYSTEM_FILE).write_bytes(msgspec.json.encode(allowed))
    with open(os.open(FILE, os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="ascii") as file:
        file.write(ruleset())
    with Rtnetlink() as kernel:
        for link in kernel.links():
            kernel.set_up(link.number)
    bridge.bring_up(DEFAULT_NETWORK)
    bridge_filter.expect()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(HOSTD_SOCKET)
    listener.listen()
    Path(HOSTD_SOCKET).chmod(0o666)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [], 0.5)
        if sys.stdin in ready:
            return
        if listener in ready:
            hostd_request.serve(listener.accept()[0], NOBODY)  # type: ignore[arg-type]
        hostd_tap.tidy()


def _name_of(uid: int) -> str:
    """Return the name of a user; one that the host does not know gets one here."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        known = Path("/run/passwd")
        known.write_text(f"{Path('/etc/passwd').read_text()}guest:x:{uid}:{uid}::/nonexistent:/bin/sh\n")
        subprocess.run(["mount", "--bind", known, "/etc/passwd"], check=True)
        return "guest"


if __name__ == "__main__":
    main(int(sys.argv[1]))
