"""The real guest's end of the link without a machine, whose keepers come and go, as after a snapshot."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import subprocess
import sys
import threading

from keeper_rig import Keeper, Place, machine, memory
from shim_rig import as_user, seccomp_without_userns

AS_CHANNEL = "import os, sys; os.dup2(int(sys.argv[1]), 20); os.execvp(sys.argv[2], sys.argv[2:])"
"""In the child: its channel is descriptor 20, a number that may be anybody's in this process."""


class Kept:
    """The real guest's end, whose keepers come and go: the bytes between them go through here."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.guest, theirs = socket.socketpair()
        made = memory(seccomp_without_userns())
        filtered = fcntl.fcntl(made, fcntl.F_DUPFD_CLOEXEC, 64)  # out of the way of the number that the guest expects
        self.log = (place.directory / "guest.log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-c", AS_CHANNEL, str(theirs.fileno()), *machine(place, filtered)],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
            pass_fds=[theirs.fileno(), filtered], **as_user(),
        )  # fmt: skip
        for fd in (theirs.detach(), made, filtered):
            os.close(fd)
        self._carrier: threading.Thread | None = None

    def keeper(self, *options: str) -> Keeper:
        """Return a keeper of this guest, which has its `B`."""
        path = self.place.directory / "vsock.sock"
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            path.chmod(0o777)
            listener.listen()
            listener.settimeout(10)
            keeper = Keeper(self.place, "--vsock", str(path), *options, monitor=["/bin/sleep", "60"])
            keeper.send_begin()
            connection, _ = listener.accept()
        assert connection.recv(13) == b"CONNECT 5000\n"
        connection.sendall(b"OK 1073741824\n")
        self._stop = threading.Event()
        self._carrier = threading.Thread(target=self._carry, args=(connection, self._stop))
        self._carrier.start()
        return keeper

    def _carry(self, keeper: socket.socket, stop: threading.Event) -> None:
        ways = {keeper: self.guest, self.guest: keeper}
        with keeper:
            while True:
                ready = select.select(list(ways), [], [], 0.05)[0]
                if not ready and stop.is_set():
                    return
                for one in ready:
                    data = one.recv(1 << 16)
                    if not data:
                        return
                    ways[one].sendall(data)

    def leave(self, keeper: Keeper) -> None:
        """Hold the guest still, as for a snapshot, and take its keeper away."""
        keeper.channel.send("Q")
        assert keeper.until("Q") == b""
        self.detach()
        keeper.close()

    def detach(self) -> None:
        """Carry what is under way, and no more."""
        if self._carrier:
            self._stop.set()
            self._carrier.join()
            self._carrier = None

    def said(self) -> str:
        """Return what the guest's end printed."""
        return (self.place.directory / "guest.log").read_text()

    def close(self) -> None:
        """End it."""
        self.detach()
        self.guest.close()
        self.process.kill()
        self.process.wait()
        self.log.close()
