"""Hearing from the kernel when somebody changes a packet filter: the multicast group that `nft monitor` reads.

Only the names of changed tables are taken from the messages; what the change was is found out by
listing the table. Sources: netlink(7), linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator

_NETFILTER = 12  # NETLINK_NETFILTER
_GROUP = 7  # NFNLGRP_NFTABLES
_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES, in the upper byte of a message's type
_GENERATION = {15, 16}  # NFT_MSG_NEWGEN, NFT_MSG_GETGEN: end of a transaction, without a table
_TABLE = 1  # NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE …: the first attribute everywhere
_HEADER = struct.Struct("=IHHII")
_FAMILY_BYTES = 4  # struct nfgenmsg
_ATTRIBUTE = struct.Struct("=HH")
_NESTED_BITS = 0xC000
_BUFFER_BYTES = 4 << 20
_READ_BYTES = 1 << 17


class Changes:
    """An open subscription. Needs CAP_NET_ADMIN in the network namespace that is watched."""

    def __init__(self) -> None:
        """Subscribe; changes from now on are heard.

        Raises:
            OSError: the kernel does not let us.
        """
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETFILTER)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
            self._socket.bind((0, 1 << (_GROUP - 1)))
            self._socket.setblocking(False)
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor, to wait for."""
        return self._socket.fileno()

    def close(self) -> None:
        """End the subscription."""
        self._socket.close()

    def concern(self, table: str) -> bool:
        """Read all that has come in, and say whether any of it may have changed a table of this name.

        Messages that were lost, or that cannot be read, may have.

        Raises:
            OSError: the socket is broken.
        """
        found = False
        while True:
            try:
                data, (sender, _) = self._socket.recvfrom(_READ_BYTES)
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                found = True
                continue
            # Other processes may send to a group only with CAP_NET_ADMIN; what they say is no news all the same.
            found = found or (sender == 0 and any(name in {table, ""} for name in tables(data)))


def tables(data: bytes) -> Iterator[str]:
    """Yield the name of the table in each message; empty where none can be found in one that should have it."""
    offset = 0
    while offset < len(data):
        if len(data) - offset < _HEADER.size:
            yield ""
            return
        length, kind, _, _, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size or length > len(data) - offset:
            yield ""
            return
        if kind >> 8 == _SUBSYSTEM and kind & 0xFF not in _GENERATION:
            yield _first_name(data[offset + _HEADER.size + _FAMILY_BYTES : offset + length])
        offset += (length + 3) & ~3


def _first_name(attributes: bytes) -> str:
    offset = 0
    while offset + _ATTRIBUTE.size <= len(attributes):
        length, kind = _ATTRIBUTE.unpack_from(attributes, offset)
        if length < _ATTRIBUTE.size or offset + length > len(attributes):
            return ""
        if kind & ~_NESTED_BITS == _TABLE:
            return attributes[offset + _ATTRIBUTE.size : offset + length].rstrip(b"\0").decode("utf-8", "replace")
        offset += (length + 3) & ~3
    return ""
