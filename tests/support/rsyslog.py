"""rsyslog from Debian as an ordinary process of a test: receives by UDP, TCP or TLS, and writes what came."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAM = "/usr/sbin/rsyslogd"
_STARTED_S = 15.0

_CONFIGURATION = """
global(workDirectory="{folder}" {tls})
template(name="raw" type="string" string="%rawmsg%\\n")
module(load="{module}" {mode})
ruleset(name="kept") {{ action(type="omfile" file="{folder}/received" template="raw" asyncWriting="off"
                               flushOnTXEnd="on") }}
input(type="{module}" address="127.0.0.1" port="{port}" ruleset="kept")
"""
_TLS = (
    'defaultNetstreamDriver="gtls" defaultNetstreamDriverCAFile="{authority}" '
    'defaultNetstreamDriverCertFile="{certificate}" defaultNetstreamDriverKeyFile="{key}"'
)
_TLS_MODE = 'streamDriver.name="gtls" streamDriver.mode="1" streamDriver.authMode="{}"'


class Rsyslog:
    """One receiver on a port of its own, which it keeps over restarts."""

    def __init__(self, folder: Path, scheme: str, *, authority=None, name="localhost", mutual=False) -> None:
        """Start it; with TLS its certificate is for `name`, and with `mutual` it asks for one of the same authority."""
        folder.mkdir(parents=True, exist_ok=True)
        self.scheme, self._folder = scheme, folder
        kind = socket.SOCK_DGRAM if scheme == "udp" else socket.SOCK_STREAM
        with socket.socket(socket.AF_INET, kind) as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        tls = mode = ""
        if scheme == "tls":
            certificate, key = authority.certificate(name)
            tls = _TLS.format(authority=authority.file, certificate=certificate, key=key)
            mode = _TLS_MODE.format("x509/certvalid" if mutual else "anon")
        text = _CONFIGURATION.format(
            folder=folder, tls=tls, mode=mode, port=self.port, module="imudp" if scheme == "udp" else "imtcp"
        )
        (folder / "rsyslog.conf").write_text(text)
        self._process = None
        self.start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"{self.scheme}://localhost:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it listens."""
        command = [PROGRAM, "-n", "-f", self._folder / "rsyslog.conf", "-i", self._folder / "pid"]
        log = (self._folder / "log").open("ab")
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + _STARTED_S
        while not self._listens():
            assert self._process.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < deadline, "rsyslog does not listen"
            time.sleep(0.05)

    def _listens(self) -> bool:
        """Whether the kernel shows a socket on its port; nothing is sent to it."""
        state = " 07 " if self.scheme == "udp" else " 0A "
        return any(state in line for line in self._sockets())

    def _sockets(self) -> list[str]:
        """Return what the kernel says of sockets on its port: with UDP the last number is what it threw away."""
        table = "/proc/net/udp" if self.scheme == "udp" else "/proc/net/tcp"
        return [line for line in Path(table).read_text().splitlines() if f":{self.port:04X} " in line[:30]]

    def _log(self) -> str:
        """Return what it said last."""
        return (self._folder / "log").read_text()[-2000:]

    def pause(self) -> None:
        """Let it read nothing any more."""
        self._process.send_signal(signal.SIGSTOP)

    def stop(self) -> None:
        """End it, as a crash does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(20)
            (self._folder / "pid").unlink(missing_ok=True)
        self._process = None

    def received(self) -> list[bytes]:
        """Return the messages that it wrote."""
        try:
            return (self._folder / "received").read_bytes().splitlines()
        except FileNotFoundError:
            return []

    def wait(self, enough, timeout_s: float = 30.0) -> list[bytes]:
        """Return the messages once `enough` says so."""
        deadline = time.monotonic() + timeout_s
        while not enough(found := self.received()):
            assert time.monotonic() < deadline, (len(found), self._sockets(), self._log())
            time.sleep(0.1)
        return found
