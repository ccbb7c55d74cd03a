"""The process that takes words out of prompts for one run: a pattern that never ends is ended with it.

    python -I -m cloister.services.redaction        its broker starts it and writes to its standard input

`re` cannot be interrupted, and a pattern such as `(a+)+$` takes longer than anybody lives. So patterns of the owner run
here, where the kernel ends them: SIGALRM, which nothing catches, after the time for one body, and a bound on memory.
The broker has a clock of its own; this one holds also when the broker was killed meanwhile.

What goes in and out: u32 length and a `Wish` as JSON, once; then per body u64 length and body, answered by u64
length, u32 matches and body. All integers are big endian.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import struct
import sys
from typing import BinaryIO

import msgspec

from cloister.host.secrets_memory import keep_memory_private
from cloister.llm.redact import Redactor, Wish

BODY_S = 10
"""The most time for one body."""
_MEMORY_BYTES = 2 << 30
_NICE = 5
"""It gives way to the event loop."""
_LENGTH, _BODY, _ANSWER = struct.Struct(">I"), struct.Struct(">Q"), struct.Struct(">QI")


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answer bodies until there are no more."""
    wish = msgspec.json.decode(source.read(_LENGTH.unpack(source.read(_LENGTH.size))[0]), type=Wish)
    redactor = Redactor(wish.patterns, secrets=wish.secrets, key=wish.key)
    while len(head := source.read(_BODY.size)) == _BODY.size:
        body = source.read(_BODY.unpack(head)[0])
        signal.alarm(BODY_S + 1)
        body, count = redactor.redact(body)
        signal.alarm(0)
        sink.write(_ANSWER.pack(len(body), count))
        sink.write(body)
        sink.flush()


def main() -> int:
    """Serve standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    keep_memory_private()
    os.nice(_NICE)
    with contextlib.suppress(BrokenPipeError):
        serve(sys.stdin.buffer, sys.stdout.buffer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
