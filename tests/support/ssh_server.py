"""A real OpenSSH server of an ordinary user on loopback, with host keys of its own, and a person's keys and ssh-agent.

sshd(8) runs in its inetd mode, one process per connection, behind a listener of ours: so the
port can be 0. Everything lies in one temporary directory; nothing of the machine's ssh is used.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import Self

from support.listening import await_socket

SSHD = "/usr/sbin/sshd"
BWRAP = "bwrap"
NAME = "host.cloister.internal"
"""What the sandbox calls the host's loopback."""


def named(words: list[str], folder: Path) -> list[str]:
    """Return a command that runs where this user has a name.

    OpenSSH does nothing for a user id without an entry in the password database, and `make test` has such a one. Then
    the command sees a password database of its own, by bubblewrap; ids and everything else stay what they are.
    """
    with contextlib.suppress(KeyError):
        pwd.getpwuid(os.getuid())
        return words
    uid, gid = os.getuid(), os.getgid()
    passwd = folder / "passwd"
    passwd.write_text(f"user{uid}:x:{uid}:{gid}::{folder}:/bin/sh\n")
    return [BWRAP, "--dev-bind", "/", "/", "--ro-bind", str(passwd), "/etc/passwd", "--die-with-parent", "--", *words]


def make_key(path: Path, kind: str = "ed25519", comment: str = "made-up") -> Path:
    """Make a key pair without a passphrase; return the private part's path."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    words = ["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", comment, "-f", str(path)]
    subprocess.run(named(words, path.parent), check=True)
    return path


def public(path: Path) -> str:
    """Return type and base64 of a key pair's public part."""
    return " ".join(Path(f"{path}.pub").read_text().split()[:2])


def fingerprint(path: Path) -> str:
    """Return `SHA256:…`, as ssh-keygen says it."""
    words = named(["ssh-keygen", "-l", "-f", f"{path}.pub"], path.parent)
    shown = subprocess.run(words, check=True, capture_output=True, text=True)
    return shown.stdout.split()[1]


class SshServer:
    """The server. A context manager."""

    def __init__(self, folder: Path, authorized: list[str], kind: str = "ed25519") -> None:
        """Let the authorized public keys in. The kind `certificate` is a key that an authority of its own certifies."""
        folder.mkdir(parents=True)
        self.authority = make_key(folder / "authority") if kind == "certificate" else None
        self.host_key = make_key(folder / "host_key", "ed25519" if self.authority else kind)
        (folder / "authorized_keys").write_text("".join(f"{line}\n" for line in authorized))
        self._config = folder / "sshd_config"
        self._config.write_text(
            f"HostKey {self.host_key}\nAuthorizedKeysFile {folder}/authorized_keys\nPidFile none\nUsePAM no\n"
            "StrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nLogLevel VERBOSE\n"
        )
        if self.authority:
            words = ["ssh-keygen", "-q", "-s", str(self.authority), "-h", "-I", "made-up", "-n", NAME]
            subprocess.run(named([*words, f"{self.host_key}.pub"], folder), check=True)
            with self._config.open("a") as config:
                config.write(f"HostCertificate {self.host_key}-cert.pub\n")
        self._log = folder / "log"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._children: list[subprocess.Popen[bytes]] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._listener.getsockname()[1])

    @property
    def place(self) -> str:
        """As a policy names it."""
        return f"{NAME}:{self.port}"

    @property
    def known(self) -> str:
        """Its line in known_hosts."""
        if self.authority:
            return f"@cert-authority [{NAME}]:{self.port} {public(self.authority)}\n"
        return f"[{NAME}]:{self.port} {public(self.host_key)}\n"

    @property
    def log(self) -> str:
        """What sshd wrote."""
        return self._log.read_text() if self._log.exists() else ""

    def __enter__(self) -> Self:
        """Serve."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop, and end what is open."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)
        for child in self._children:
            if child.poll() is None:
                child.terminate()
            child.wait(10)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, self._log.open("ab") as log:
                words = named([SSHD, "-i", "-e", "-f", str(self._config)], self._config.parent)
                self._children.append(subprocess.Popen(words, stdin=connection, stdout=connection, stderr=log))


class SshAgent:
    """A person's ssh-agent with their keys. A context manager."""

    def __init__(self, folder: Path, keys: list[Path]) -> None:
        """Hold keys; `folder` must have a short path (unix(7))."""
        self.socket = folder / "agent.sock"
        self._folder = folder
        self._keys = keys
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start it and add the keys."""
        words = named(["ssh-agent", "-D", "-a", str(self.socket)], self._folder)
        self._process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        await_socket(self.socket)
        for key in self._keys:
            self.run("ssh-add", "-q", str(key))
        return self

    def run(self, *words: str) -> str:
        """Run a command that finds the agent; return what it says."""
        command = named(list(words), self._folder)
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=20)
        return done.stdout + done.stderr

    def __exit__(self, *_: object) -> None:
        """End it."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(10)

    @property
    def environment(self) -> dict[str, str]:
        """How programs find it."""
        return {"SSH_AUTH_SOCK": str(self.socket), "PATH": os.environ["PATH"]}


def missing() -> str:
    """Return why no server can be started here, or nothing."""
    if not Path(SSHD).exists() or shutil.which("ssh-agent") is None:
        return "OpenSSH is not installed"
    try:
        shell = pwd.getpwuid(os.getuid()).pw_shell
    except KeyError:
        return ""
    return f"the login shell {shell} takes no commands" if shell.endswith(("nologin", "false")) else ""
