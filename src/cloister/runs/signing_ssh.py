"""Keys of a person's own ssh-agent: named keys, their hosts and git's settings, looked up on this host.

From `credentials.NAME.keys`, `.pub` files, known_hosts and git's configuration. Public parts only; no
private key is ever read, and the ssh-agent is not asked.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping

from cloister.credentials import ssh_client, ssh_keys
from cloister.credentials.ssh_agent import Grant, Ring
from cloister.credentials.ssh_known_hosts import SSH_PORT, HostKeys, KnownHosts, KnownHostsError, Place
from cloister.credentials.ssh_wire import WireError
from cloister.egress.hosts import parse_authority
from cloister.errors import PolicyError
from cloister.isolation.inner import BOX
from cloister.isolation.namespace import SHIM
from cloister.policy.model import Credential
from cloister.runs.signing_model import BoxFile, ServedAgent, Settings, Signing, Situation, Sources, wrong

_SOCKET, _CONFIG, _KNOWN_HOSTS = "ssh-agent.sock", "ssh_config", "known_hosts"
_SYSTEM_FILES = ("/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")
_MAX_BYTES = 4 << 20
_MAX_PUBLIC = 64
"""Files of `~/.ssh` that are looked through for a fingerprint."""


def look_ssh(situation: Situation, named: Mapping[str, Credential]) -> tuple[Signing, Sources]:
    """Return what a run gets of the keys for ssh, and for commits signed by ssh.

    Raises:
        PolicyError: a key or a host's key cannot be found, or where it stands cannot be trusted.
    """
    by_ssh = {name: one for name, one in named.items() if {"ssh", "git"} & set(one.uses)}
    found = _Found(situation, by_ssh)
    if not found.grants:
        return Signing(), Sources()
    ring = Ring(situation.agent, found.grants, found.hosts, found.revoked)
    served = ServedAgent("ssh", _SOCKET, tuple(_words(grant) for grant in found.grants))
    known_hosts = BoxFile(_KNOWN_HOSTS, ssh_client.known_hosts(found.hosts))
    config = ssh_client.config(shim=SHIM, known_hosts=f"{BOX}/{_KNOWN_HOSTS}")
    files = (BoxFile(_CONFIG, config, ".ssh/config"), known_hosts) if found.hosts else ()
    variables = {"SSH_AUTH_SOCK": f"{BOX}/{_SOCKET}"}
    directories = (".ssh",) if files else ()
    spoken = [f"ssh to {', '.join(place.text for place in sorted(found.hosts))}"] if found.hosts else []
    git = found.git_settings()
    spoken += ["git signs commits and tags"] if git else []
    signing = Signing((served,), files, directories, variables, git, spoken=tuple(spoken))
    return signing, Sources(ring, situation.environment.get("SSH_AUTH_SOCK", ""))


class _Found:
    """The lookups of one start."""

    def __init__(self, situation: Situation, named: Mapping[str, Credential]) -> None:
        self._situation = situation
        self._own: dict[str, bytes] | None = None
        self._blobs: dict[str, bytes] = {}
        self.revoked: frozenset[bytes] = frozenset()
        self.grants = tuple(grant for name, one in named.items() for grant in self._grants(name, one))
        places = {place for grant in self.grants for place in grant.places}
        self.hosts = self._hosts(places) if places else {}

    def git_settings(self) -> Settings:
        """Return git's settings, where a key may sign commits."""
        names = list(dict.fromkeys(grant.key for grant in self.grants if grant.git))
        if not names:
            return ()
        keys = [ssh_client.GitKey(name, self._blobs.get(name) or self._in_home().get(name, b"")) for name in names]
        return ssh_client.git_settings(keys, self._situation.git, self._own_signing_key())

    def _grants(self, name: str, credential: Credential) -> Iterator[Grant]:
        where = f".agents.{self._situation.agent}.credentials.{name}"
        hosts = credential.hosts if "ssh" in credential.uses else ()
        parsed = (parse_authority(host, SSH_PORT) for host in hosts)
        places = frozenset(Place(host.text, port) for host, port in parsed)
        for key in credential.keys:
            if key.startswith("gpg:"):
                continue
            if key.startswith("SHA256:"):
                shown = key
            else:
                blob = self._public_file(key, f"{where}.keys")
                shown = ssh_keys.fingerprint(blob)
                self._blobs[shown] = blob
            yield Grant(name, shown, places, "git" in credential.uses)

    def _hosts(self, places: set[Place]) -> dict[Place, HostKeys]:
        own = (f"{self._situation.home}/.ssh/known_hosts", f"{self._situation.home}/.ssh/known_hosts2")
        texts = [text for path in (*own, *_SYSTEM_FILES) if (text := self._read(path, "")) is not None]
        try:
            known = KnownHosts(texts)
        except KnownHostsError as error:
            raise wrong("known-hosts-unreadable", str(error), own[0], f"ssh-keygen -l -f {own[0]}") from error
        self.revoked = known.revoked
        hosts = {place: known.about(place) for place in places}
        for place, keys in sorted(hosts.items()):
            if not (keys.keys or keys.authorities):
                port = f"-p {place.port} " if place.port != SSH_PORT else ""
                raise wrong(
                    "host-key-unknown",
                    f"no host key of {place.text} is in your known_hosts, so nothing could tell that host from another",
                    f".agents.{self._situation.agent}.credentials",
                    f"ssh {port}{place.host} once, and compare the key; or take the host out of hosts",
                )
        return hosts

    def _public_file(self, path: str, where: str) -> bytes:
        """Return the key in a `.pub` file that the policy names."""
        full = self._situation.home + path[1:] if path.startswith("~/") else path
        text = self._read(full if full.startswith("/") else f"{self._situation.home}/{full}", where)
        if text is None:
            raise wrong("key-missing", f"{path} does not exist", where, f"ssh-keygen -y -f {path[:-4]} > {path}")
        try:
            return ssh_keys.parse_public(text)
        except WireError as error:
            raise wrong("key-unreadable", f"{path} is no public key: {error}", where, "name a .pub file") from error

    def _own_signing_key(self) -> str:
        """Return the fingerprint of the key that the person's git signs with: a literal key, or beside a file."""
        value = self._situation.git.get("user.signingkey", "")
        if self._situation.git.get("gpg.format") != "ssh" or not value:
            return ""
        try:
            if value.startswith(("key::", "ssh-")):
                return ssh_keys.fingerprint(ssh_keys.parse_public(value.removeprefix("key::")))
            path = value if value.endswith(".pub") else f"{value}.pub"
            text = self._read(self._situation.home + path[1:] if path.startswith("~/") else path, "")
            return ssh_keys.fingerprint(ssh_keys.parse_public(text)) if text else ""
        except (WireError, PolicyError):
            return ""  # then it is none of the named ones

    def _in_home(self) -> dict[str, bytes]:
        """Return the public keys in `~/.ssh`, by fingerprint: a fingerprint cannot lie about its key."""
        if self._own is None:
            self._own = {}
            folder = f"{self._situation.home}/.ssh"
            try:
                names = sorted(name for name in os.listdir(folder) if name.endswith(".pub"))[:_MAX_PUBLIC]
            except OSError:
                names = []
            for name in names:
                try:
                    blob = ssh_keys.parse_public(self._read(f"{folder}/{name}", "") or "")
                except (WireError, PolicyError):
                    continue
                self._own[ssh_keys.fingerprint(blob)] = blob
        return self._own

    def _read(self, path: str, where: str) -> str | None:
        """Return a file's text, or None when there is none.

        Raises:
            PolicyError: somebody else than the person could have written it.
        """
        real = os.path.realpath(path)
        if any(real == top or real.startswith(f"{top}/") for top in self._situation.writable):
            raise wrong("key-untrusted", f"{path} lies where agents write", where or path, "name a file elsewhere")
        try:
            with open(real, "rb", opener=_opener) as file:
                info = os.fstat(file.fileno())
                data = file.read(_MAX_BYTES + 1) if stat.S_ISREG(info.st_mode) else b""
        except FileNotFoundError:
            return None
        except OSError as error:
            raise wrong("key-unreadable", f"{path}: {error.strerror}", where or path, f"ls -l {path}") from error
        if info.st_uid not in {self._situation.uid, 0} or info.st_mode & 0o022:
            raise wrong(
                "key-untrusted", f"others than you can write {path}", where or path, f"chmod go-w {path}"
            )  # fmt: skip
        if not stat.S_ISREG(info.st_mode) or len(data) > _MAX_BYTES:
            raise wrong("key-unreadable", f"{path} is no file of at most 4 MiB", where or path, f"ls -l {path}")
        return data.decode("utf-8", "replace")


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)


def _words(grant: Grant) -> str:
    uses = [f"logs in to {place.text}" for place in sorted(grant.places)] + ["signs commits"] * grant.git
    return f"{grant.credential}: {grant.key} {', '.join(uses)}"
