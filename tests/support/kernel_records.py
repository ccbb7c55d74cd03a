"""Records as the BPF programs write them (`audit/bpf/event.h`), made by hand: with what an agent chose in them."""

from __future__ import annotations

import struct

HEADER = struct.Struct("<IHHQQQQIHBBIIIIIIq6Q4H16s")
EXEC, FORK, EXIT, CONNECT, SEND, BIND, CALL, FILE, PRIVILEGE, TRACE, KERNEL, RING_OP = range(1, 13)


def record(  # noqa: PLR0913  # the fields of a record
    kind: int, *, parts: tuple[bytes, ...] = (), call: int = 0, ret: int = 0, flags: int = 0, watch: int = 1,
    args: tuple[int, ...] = (), comm: bytes = b"agent", tier: int = 1, used: int | None = None,
    lengths: tuple[int, ...] | None = None,
) -> bytes:  # fmt: skip
    """Return one record; `lengths` and `used` may lie."""
    data = b"".join(parts)
    told = (*(lengths or tuple(len(part) for part in parts)), 0, 0, 0, 0)[:4]
    values = (*args, 0, 0, 0, 0, 0, 0)[:6]
    size = HEADER.size + len(data)
    head = HEADER.pack(
        size, kind, call, 1_000, 1, 77, 66, watch, 0, tier, flags, 4242, 4242, 2, 4241, 1000,
        len(data) if used is None else used, ret, *values, *told, comm,
    )  # fmt: skip
    return head + data
