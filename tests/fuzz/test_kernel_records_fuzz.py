"""Any record of the kernel's side becomes one line that decodes into `Event`, whatever bytes an agent put into it."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from cloister.audit import calls
from cloister.audit.event import Event
from cloister.host.kernel_events import Call, Reader
from support import kernel_records as made

READER = Reader(-1, -1, (0, 0), bytes(16))
READER.name(1, {"run": "r", "agent": "a\n\x1b", "user": "ü|="})
READER.describe([Call(*row) for row in calls.described("x86_64")])
HOSTILE = st.binary(max_size=300) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass"))
U64 = st.integers(0, 2**64 - 1)


@given(
    kind=st.integers(0, 20), call=st.integers(0, 600), parts=st.lists(HOSTILE, max_size=4).map(tuple),
    flags=st.integers(0, 255), ret=st.integers(-(2**63), 2**63 - 1), args=st.lists(U64, max_size=6).map(tuple),
    comm=st.binary(max_size=16), tier=st.integers(0, 255), watch=st.integers(0, 3),
    used=st.none() | st.integers(0, 2**32 - 1),
    lengths=st.none() | st.lists(st.integers(0, 65535), max_size=4).map(tuple),
)  # fmt: skip
def test_any_record_is_one_strict_line(**fields: object) -> None:
    """One line, no raw control character, and every field of the type that `Event` says."""
    line = READER.format(made.record(**fields))  # type: ignore[arg-type]

    assert not any(byte < 0x20 for byte in line)
    found = msgspec.json.decode(line, type=Event, strict=True)
    assert found.source == "sensor"


@given(text=HOSTILE)
def test_text_is_kept_as_python_would(text: bytes) -> None:
    """An agent's bytes stand in the log as they were, but for those that are no UTF-8, which are backslash escapes."""
    argument = text.replace(b"\0", b"")
    line = READER.format(made.record(made.EXEC, parts=(b"\0", b"\0", argument + b"\0")))
    found = msgspec.json.decode(line, type=Event, strict=True)

    assert found.process
    assert found.process.cmd_line == (argument.decode("utf-8", "backslashreplace"),)


@given(text=HOSTILE)
def test_strings_are_written_as_msgspec_writes_them(text: bytes) -> None:
    """The text of a line is the same, byte for byte, whether C or Python wrote it."""
    name = text.replace(b"\0", b"")[:16]
    line = READER.format(made.record(made.FORK, comm=name))
    wanted = msgspec.json.encode(name.decode("utf-8", "backslashreplace"))

    assert (b'"name":' + wanted in line) if name else (b'"name"' not in line)
