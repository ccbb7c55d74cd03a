"""What ssh and git inside are told: configuration made for one run, in place of a person's own.

ssh goes out through the run's proxy, takes only host keys that the person knows, and has no keys
but those of the agent's socket. git signs with a key that the policy names, as the person's own
git would. Texts only; ssh_config(5), git-config(1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cloister.credentials import ssh_keys
from cloister.credentials.ssh_known_hosts import HostKeys, Place

_CONFIG = """\
# Made by cloister for this run.
Host localhost 127.0.0.1 ::1
    ProxyCommand none
Host *
    ProxyCommand {shim} connect %h %p
    UserKnownHostsFile {known_hosts}
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    UpdateHostKeys no
    CanonicalizeHostname no
    IdentityFile none
    PreferredAuthentications publickey
    ForwardAgent no
"""
_FIRST_LISTED = "ssh-add -L"


class GitKey(NamedTuple):
    """A key that may sign commits: its name, and the key itself where it is known before the agent is asked."""

    fingerprint: str
    blob: bytes = b""


def config(*, shim: str, known_hosts: str) -> str:
    """Return `~/.ssh/config`; `IdentityFile none` leaves the agent's keys, which the filter has chosen by host."""
    return _CONFIG.format(shim=shim, known_hosts=known_hosts)


def known_hosts(hosts: Mapping[Place, HostKeys]) -> str:
    """Return a known_hosts file with the allowed hosts and no other."""
    return "".join(f"{line}\n" for place in sorted(hosts) for line in hosts[place].lines(place))


def git_settings(keys: Sequence[GitKey], person: Mapping[str, str], own: str) -> tuple[tuple[str, str], ...]:
    """Return git's settings for signing by ssh.

    Args:
        keys: those that may sign commits, in the policy's order; at least one.
        person: the person's `gpg.format`, `user.signingkey`, `commit.gpgsign` and `tag.gpgsign`, as far as set.
        own: the fingerprint of the person's own signing key, where it is one for ssh.
    """
    chosen = next((key for key in keys if key.fingerprint == own), keys[0])
    settings = [("gpg.format", "ssh")]
    if chosen.blob:
        settings.append(("user.signingkey", f"key::{ssh_keys.write_public(chosen.blob)}"))
    else:
        settings.append(("gpg.ssh.defaultkeycommand", _FIRST_LISTED))  # the filter lists keys for git first
    if person.get("gpg.format") == "ssh":
        settings += [(name, person[name]) for name in ("commit.gpgsign", "tag.gpgsign") if name in person]
    return tuple(settings)
