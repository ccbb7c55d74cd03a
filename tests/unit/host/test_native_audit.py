"""The extension of the audit, without a kernel: hash and chain are those of Python, records become events."""

from __future__ import annotations

import hashlib
import importlib
import re
from pathlib import Path

import msgspec
import pytest

from cloister.audit import calls
from cloister.audit.chain import Chain, genesis
from cloister.audit.event import Event
from cloister.audit.identity import process_uid
from cloister.audit.kinds import kinds
from cloister.host import kernel_events
from support import kernel_records as made

SOURCES = Path(__file__).parents[3] / "src/cloister"
BOOT = bytes(range(16))


@pytest.fixture
def reader() -> kernel_events.Reader:
    """A reader without rings, which knows one watch."""
    one = kernel_events.Reader(-1, -1, (0, 0), BOOT)
    one.name(1, {"run": "r1", "agent": 'a"b', "user": ""})
    one.describe([kernel_events.Call(*row) for row in calls.described("x86_64")])
    return one


def event(reader: kernel_events.Reader, record: bytes) -> Event:
    """Return what the reader makes of a record."""
    return msgspec.json.decode(reader.format(record), type=Event, strict=True)


@pytest.mark.parametrize("length", [0, 1, 3, 55, 56, 57, 63, 64, 65, 119, 120, 1000])
def test_the_hash_is_sha256(length: int) -> None:
    """Both forms of the hash, the portable one and the processor's, are hashlib's, at every border of its padding."""
    module = importlib.import_module("cloister.host._audit")
    data = bytes(index * 7 & 255 for index in range(length))
    digest = module.ffi.new("uint8_t[32]")
    module.lib.sha256_portable(data, length, digest)
    assert bytes(module.ffi.buffer(digest)) == hashlib.sha256(data).digest()

    lines, _, last = kernel_events.chain_lines(b'{"a":"' + b"x" * length + b'"}\n', 0, bytes(32))
    text = lines.rpartition(b',"hash"')[0]
    assert last == hashlib.sha256(bytes(32) + text).digest()


def test_lines_of_c_are_those_of_python() -> None:
    """The chain in C makes the same bytes as the chain in Python, and goes on where it stood."""
    objects = [b'{"time":%d,"kind":"k"}' % number for number in range(200)]
    at = genesis("0" * 32)
    python, native = Chain("0" * 32), b""
    for begin in range(0, 200, 50):
        more, seq, digest = kernel_events.chain_lines(b"\n".join(objects[begin : begin + 50]), *at)
        at = at._replace(seq=seq, hash=digest)
        native += more

    assert native == python.lines(objects)
    assert at == python.position


@pytest.mark.parametrize("wrong", [b"x", b"{", b"{}", b"[1,2,3]", b'{"a":1}\n\n'])
def test_what_is_no_object_is_refused(wrong: bytes) -> None:
    """Nothing but one JSON object per line gets into the chain."""
    with pytest.raises(ValueError, match="Invalid"):
        kernel_events.chain_lines(wrong, 0, bytes(32))


def test_a_launch_has_all_its_words(reader: kernel_events.Reader) -> None:
    """Executable, arguments, directory, names and identities stand where `Event` has them."""
    parts = (b"sh\0bin\0usr\0", b"./run.sh\0", b"sh\0-c\0\0", b"src\0home\0")
    found = event(reader, made.record(made.EXEC, parts=parts, flags=1))

    assert found.process
    assert (found.kind, found.run, found.agent, found.user) == ("process.executed", "r1", 'a"b', "")
    assert (found.process.path, found.process.cwd) == ("/usr/bin/sh", "/home/src")
    assert found.process.cmd_line == ("sh", "-c", "")
    assert found.process.truncated
    assert found.process.uid == process_uid(BOOT, 77, 4242)
    assert found.process.parent_uid == process_uid(BOOT, 66, 4241)
    assert found.file
    assert found.file.path == "./run.sh"


def test_a_call_is_told_by_its_row(reader: kernel_events.Reader) -> None:
    """A call's kind, severity, path, directory and flags are those of `calls.toml`; a failure has its errno."""
    number = calls.numbers("x86_64")["openat"]
    parts = (b"x/y\0", b"", b"src\0home\0")
    found = event(reader, made.record(made.CALL, call=number, ret=-13, flags=32, args=(0, 0, 577), parts=parts))

    assert found.file
    assert (found.kind, found.error, found.file.path, found.file.flags) == ("file.opened", 13, "/home/src/x/y", 577)
    assert not found.file.resolved
    assert found.details == {"call": "openat"}


def test_the_root_and_names_without_a_directory(reader: kernel_events.Reader) -> None:
    """The root is `/`, what lies in it has no second slash, and an empty text is its directory."""
    number = calls.numbers("x86_64")["openat"]
    for parts, path in (((b"x\0", b"", b"\0"), "/x"), ((b"\0", b"", b"tmp\0"), "/tmp"), ((b"\0", b"", b"\0"), "/")):
        found = event(reader, made.record(made.CALL, call=number, parts=parts))
        assert found.file
        assert found.file.path == path


def test_unix_sockets_have_their_path_or_name(reader: kernel_events.Reader) -> None:
    """The address of a Unix socket is a path, or an abstract name behind an at sign."""
    number = calls.numbers("x86_64")["connect"]
    for address, path in ((b"\1\0/run/x\0", "/run/x"), (b"\1\0\0name", "@name"), (b"\1\0", "")):
        found = event(reader, made.record(made.CALL, call=number, parts=(address,)))
        assert found.endpoint
        assert (found.endpoint.path, found.endpoint.protocol) == (path, "unix")


def test_kinds_and_severities_in_c_are_those_of_the_table() -> None:
    """Whatever kind C writes is in kinds.toml, with the same severity."""
    text = (SOURCES / "host/native/events.c").read_text()
    found = re.findall(r'\{"([a-z]+\.[a-z-]+)", (\d)\}', text)

    assert len(found) > 15
    assert all(kinds()[kind].severity == int(severity) for kind, severity in found)


def test_the_layout_is_the_headers() -> None:
    """What these tests make is what the kernel writes: the same size as the struct in event.h."""
    text = (SOURCES / "audit/bpf/event.h").read_text()
    body = re.search(r"struct event \{(.*?)\n\};", text, re.DOTALL)
    assert body
    sizes = {"__u8": 1, "__u16": 2, "__u32": 4, "__u64": 8, "__s64": 8, "char": 1}
    constants = {"PARTS": 4}
    total = 0
    for kind, names in re.findall(r"\n\t(\w+) ([^;]+);", body[1]):
        for name in names.split(","):
            count = re.search(r"\[(\w*)\]", name)
            many = 1 if not count else 0 if not count[1] else constants.get(count[1]) or int(count[1])
            total += sizes[kind] * many
    assert total == made.HEADER.size


def test_every_call_of_the_table_exists_and_fits() -> None:
    """Each row names a call with a number, a kind that exists, and at most two texts."""
    table = calls.table()

    assert table.security.keys() <= table.numbers.keys()
    assert all(one.kind in kinds() and len(one.texts) <= 2 for one in table.security.values())
    assert all(len(name) < 32 for name in table.numbers)


def test_off_records_nothing_and_all_records_everything() -> None:
    """Shapes follow the policy: `off` is no event, `security` the table's rows, `all` every number there is."""
    assert not any(calls.shapes("x86_64", "off", files_elsewhere=False))
    some = calls.shapes("x86_64", "security", files_elsewhere=False)
    every = calls.shapes("x86_64", "all", files_elsewhere=False)
    assert some[calls.numbers("x86_64")["openat"]]
    assert not some[calls.numbers("x86_64")["getppid"]]
    assert all(every[number] for number in calls.numbers("x86_64").values())
    elsewhere = calls.shapes("x86_64", "security", files_elsewhere=True)
    assert elsewhere[calls.numbers("x86_64")["openat"]] == some[calls.numbers("x86_64")["openat"]] | 0x2000
    assert elsewhere[calls.numbers("x86_64")["mount"]] == some[calls.numbers("x86_64")["mount"]]
