"""Ask the broker for a run with fewer limits."""

import os
import socket
import subprocess

from cloister.prove.inside.support import Box

ID = "ipc-broker"
TITLE = "Ask the broker for a run with fewer limits"
PROMISE = "P-069"
CLASSES = (69,)
EXPECT = "the program may be there, the broker is not"
SHAPE = "any"


def attack(box: Box) -> None:
    """By its socket, wherever it might be; and by starting the sandbox's own helper and bubblewrap."""
    folders = {os.path.dirname(str(box.fact("broker_socket"))), f"/run/user/{os.getuid()}/cloister", "/run/cloister"}
    for folder in folders:
        box.connects(folder, "ENOENT EACCES", socket.AF_UNIX, socket.SOCK_STREAM, f"{folder}/broker.sock")
    for words in (
        ["/run/cloister/shim", "outer", "0"],
        ["/usr/bin/bwrap", "--ro-bind", "/", "/", "--unshare-user", "true"],
        ["/usr/bin/unshare", "-Ur", "true"],
    ):
        if os.access(words[0], os.X_OK) and not (box.facts.get("nested") and "shim" not in words[0]):
            done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False)
            box.must(done.returncode != 0, f"{os.path.basename(words[0])}: exit {done.returncode}")
