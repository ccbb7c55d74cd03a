"""Who asks `cloister-hostd`: the kernel's word on the other end of the socket, and the password database's.

No request names a user, so nobody can be impersonated. What a caller may do is not decided here
(`unit_grants`), except for one thing: our own accounts, as which agents run, may ask nothing at all.
"""

from __future__ import annotations

import os
import pwd
import socket
import struct
from typing import NamedTuple

from cloister.errors import DeniedError
from cloister.plan.unit import FIRST_UID, PROXY_USER, UID_COUNT

_CREDENTIALS = struct.Struct("3i")


class Caller(NamedTuple):
    """A user of this host. `groups` are those of the group database: what a login gives.

    Of the system's broker they are not asked for: it ends runs, and has no directory.
    """

    uid: int
    gid: int
    pid: int
    name: str
    home: str
    groups: tuple[int, ...]

    @property
    def is_system(self) -> bool:
        """Whether it is root, or the system's own broker."""
        return self.uid == 0 or self.name == PROXY_USER


def peer_uid(sock: socket.socket) -> int:
    """Return the uid at the other end of a Unix socket, when it connected (unix(7), SO_PEERCRED)."""
    return int(_CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[1])


def identify_caller(sock: socket.socket) -> Caller:
    """Return who connected.

    Raises:
        DeniedError: one of our own accounts, or a uid that the password database does not know.
    """
    pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if is_ours(uid):
        raise DeniedError("caller-is-agent", "an agent's account starts nothing", where=f"uid {uid}")
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        raise DeniedError(
            "caller-unknown", "the password database does not know who asks", where=f"uid {uid}"
        ) from None
    groups = () if entry.pw_name == PROXY_USER else tuple(os.getgrouplist(entry.pw_name, entry.pw_gid))
    return Caller(uid, entry.pw_gid, pid, entry.pw_name, entry.pw_dir, groups)


def is_ours(uid: int) -> bool:
    """Whether a uid lies in the range that Cloister gives to agents."""
    return FIRST_UID <= uid < FIRST_UID + UID_COUNT
