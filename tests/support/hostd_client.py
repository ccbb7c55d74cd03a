"""A caller of hostd, honest or not: sends the frames of a request over a socket of its own.

`python -m support.hostd_client` runs inside a test machine as an ordinary user, and prints what came back as JSON. Its
standard streams are the run's.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import socket
import sys
from collections.abc import Sequence

from cloister.host import tar_format, unit_carry
from cloister.host.frames import FrameError, encode_list
from support.fake_proxyd import Talk

SOCKET = "/run/cloister/hostd.sock"


def connect() -> Talk:
    """Return a connection."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(60)
    sock.connect(SOCKET)
    return Talk(sock)


def directory(path: str) -> int:
    """Open a directory as the user's broker does."""
    return os.open(path, os.O_PATH | os.O_DIRECTORY)


def sealed(files: dict[str, str]) -> int:
    """Return a sealed memory file with a tar of these."""
    made, data = set[str](), b""
    for name, text in files.items():
        parents = ["/".join(name.split("/")[:count]) for count in range(1, name.count("/") + 1)]
        data += b"".join(tar_format.encode(tar_format.Entry(one, "directory")) for one in parents if one not in made)
        made.update(parents)
        size = len(text.encode())
        data += tar_format.encode(tar_format.Entry(name, "file", size)) + text.encode() + tar_format.padding(size)
    return sealed_bytes(data + tar_format.end())


def sealed_bytes(data: bytes) -> int:
    """Return a sealed memory file."""
    memory = os.memfd_create("carry", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.write(memory, data)
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, unit_carry.SEALS)
    return memory


def ask(  # noqa: PLR0913  the parts of a request
    agent: str,
    run: str,
    workspace: int,
    inside: int,
    streams: Sequence[int] = (0, 1, 2),
    carry: int | None = None,
    extra: Sequence[str] = (),
    brought: dict[str, int] | None = None,
) -> list[tuple[str, object]]:
    """Send a whole request, and return every frame of the answer as (type, content)."""
    talk = connect()
    link, _kept = socket.socketpair(socket.AF_UNIX)
    further = {} if carry is None else {"carry": carry}
    further |= brought or {}
    fields = ["verb=run", f"agent={agent}", f"run={run}", f"brings={','.join(further)}", *extra]
    descriptors = [link.fileno(), *streams, workspace, inside, *further.values()]
    with contextlib.suppress(FrameError):  # refused already: the answer is there to be read
        talk.send("L", encode_list(field.encode() for field in fields), tuple(descriptors))
        talk.send("U", b"{}")
        talk.send("V", encode_list([b"word"]))
        talk.send("N", encode_list([b"TERM=dumb"]))
    return answers(talk)


def answers(talk: Talk) -> list[tuple[str, object]]:
    """Return every frame until the other side closes."""
    found: list[tuple[str, object]] = []
    with contextlib.suppress(FrameError, TimeoutError):
        while True:
            frame = talk.receive()
            if frame.kind == "F":
                found.append(("F", [frame.payload[0], frame.payload[1:].decode()]))
            else:
                found.append((frame.kind, json.loads(frame.payload)))
    return found


def main() -> None:
    """Ask once, and print the answer on descriptor 3, or where that is closed on standard error."""
    parser = argparse.ArgumentParser()
    parser.add_argument("agent")
    parser.add_argument("run")
    parser.add_argument("workspace")
    parser.add_argument("inside", nargs="?")
    parser.add_argument("--extra", action="append", default=[])
    parser.add_argument("--carry", default="")
    parser.add_argument("--copy", default="", help="the directory for changes")
    parser.add_argument("--repository", default="")
    given = parser.parse_args()
    carry = sealed(json.loads(given.carry)) if given.carry else None
    inside = directory(given.inside or given.workspace)
    brought = {name: directory(path) for name in ("copy", "repository") if (path := getattr(given, name))}
    place = directory(given.workspace)
    found = ask(given.agent, given.run, place, inside, carry=carry, extra=given.extra, brought=brought)
    sys.stderr.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
