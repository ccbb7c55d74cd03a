"""What the brokers say to one another of a run under systemd: understood whole, or refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import CloisterError, DeniedError, UsageError
from cloister.host.frames import Frame, FrameError, encode_list
from cloister.plan.workspace import WorkspaceLayout
from cloister.runs.live import Outcome
from cloister.runs.request import Incoming
from cloister.runs.unit_asked import decode_asked
from cloister.runs.unit_ends import explain_end, limits_reached, told, without
from cloister.runs.unit_request import UserPart
from cloister.runs.unit_words import MAX_WORDS, Told, closing_words, decode, encode, read_closing_words

ROOT = "/home/alice/p"
FIELDS = {
    "verb": "run", "agent": "pi", "run": "0123456789ab", "caller": "alice", "caller_uid": "1000", "caller_gid": "1000",
    "home": "/home/alice", "account": "cl-pi-alice", "account_uid": "1900000001", "root": ROOT,
    "directory": f"{ROOT}/x",
}  # fmt: skip


def part(**changes: Any) -> bytes:
    """Return a user's part, changed as asked."""
    values = {"layout": WorkspaceLayout(root=ROOT, mounts=(), placeholders=()), "project": "0123456789abcdef"}
    return msgspec.json.encode(UserPart(**(values | changes)))


def test_what_hostd_vouches_for_is_taken() -> None:
    """Account, caller and place come from hostd's fields; words and variables from the caller."""
    asked = decode_asked(FIELDS, part(extra_names=("EDITOR",)), [b"a b"], [b"TERM=xterm", b"odd"])
    assert (asked.account.name, asked.account.uid, asked.account.user) == ("cl-pi-alice", 1900000001, "alice")
    assert (asked.request.agent, asked.request.words, asked.request.run) == ("pi", ("a b",), "0123456789ab")
    assert asked.request.environment == {"TERM": "xterm"}
    assert asked.request.extra_names == ("EDITOR",)
    assert asked.directory == f"{ROOT}/x"


@pytest.mark.parametrize("field", ["caller", "caller_uid", "account", "account_uid", "home"])
def test_a_request_without_its_caller_is_none(field: str) -> None:
    """Without hostd's word on who asks nothing is prepared."""
    with pytest.raises(UsageError):
        decode_asked({name: value for name, value in FIELDS.items() if name != field}, part(), [], [])


def test_the_users_part_is_about_the_place_hostd_looked_at() -> None:
    """A layout of another directory than the one that hostd walked to is refused (a directory that was swapped)."""
    other = WorkspaceLayout(root="/home/alice/other", mounts=(), placeholders=())
    with pytest.raises(DeniedError, match="not where it was"):
        decode_asked(FIELDS, part(layout=other), [], [])


@pytest.mark.parametrize(
    "changes",
    [
        {"project": "../../etc"},
        {"project": ""},
        {"carried": (("../x", "file"),)},
        {"carried": (("/etc/passwd", "file"),)},
        {"carried": (("a/../b", "file"),)},
        {"carried": (("a//b", "file"),)},
        {"carried": (("a", "socket"),)},
        {"carried": (("", "file"),)},
    ],
)
def test_names_that_lead_elsewhere(changes: dict[str, Any]) -> None:
    """Names of the user's part lie below our own bases, or the request is refused; ordinary ones are taken."""
    with pytest.raises(UsageError):
        decode_asked(FIELDS, part(**changes), [], [])
    assert decode_asked(FIELDS, part(carried=((".pi/agent/AGENTS.md", "file"),)), [], [])


@given(st.binary(max_size=200))
def test_any_bytes_for_a_part(data: bytes) -> None:
    """Whatever a user sends as the own part ends in one of our own refusals."""
    with pytest.raises(CloisterError):
        decode_asked(FIELDS, data, [], [])


def test_the_lease_says_what_was_said() -> None:
    """A frame of the lease is read as it was written; what is none breaks the lease."""
    assert decode(encode(Told(event={"event": "egress", "host": "x"}))).event == {"event": "egress", "host": "x"}
    assert decode(msgspec.json.encode({"running": True})).running
    with pytest.raises(FrameError):
        decode(b'{"run": 3}')


@given(st.lists(st.text(max_size=50), max_size=100))
def test_closing_words(words: list[str]) -> None:
    """Closing words arrive in order, a bounded number of them; what is no list says nothing."""
    kept = read_closing_words(closing_words(tuple(words)))
    assert len(kept) == min(len(words), MAX_WORDS)
    assert read_closing_words(b"\xff") == ()


@given(st.binary(max_size=60))
def test_any_bytes_as_closing_words(data: bytes) -> None:
    """A user's broker cannot bring the system's down with its last words."""
    assert isinstance(read_closing_words(data), tuple)


def test_systemds_word_explains_what_nobody_saw() -> None:
    """Only an end without a word of the agent is explained by systemd: memory, time, or its result as it is."""
    gone = Outcome(125, "sandbox-died", "it ended")
    assert explain_end(gone, {"Result": "oom-kill"}).code == 137
    assert explain_end(gone, {"Result": "timeout"}).code == 124
    assert "signal" in explain_end(gone, {"Result": "signal"}).text
    assert explain_end(gone, {}) is gone
    said = Outcome(0, "exited")
    assert explain_end(said, {"Result": "oom-kill"}) is said
    assert limits_reached({"Result": "oom-kill"})
    assert limits_reached({"Result": "success"}) == ()


def test_the_receipt_keeps_numbers_only_where_there_are_any() -> None:
    """What systemd shows as `[not set]` is no number, and is left out."""
    assert told({"Result": "success", "MemoryPeak": "[not set]"}) == {"result": "success"}
    end = {"Result": "success", "MemoryPeak": "4096", "CPUUsageNSec": "1500000000"}
    assert told(end) == {"result": "success", "cpu_s": 1.5, "memory_peak": 4096}


def test_a_request_comes_in_order() -> None:
    """Frames of a request come once and in order; a second head, or words before it, break the connection."""
    head = Frame("L", encode_list([b"verb=run"]))
    incoming = Incoming()
    assert incoming.take(head) is None
    assert incoming.take(Frame("U", b"{}")) is None
    assert incoming.take(Frame("V", encode_list([b"ls"]))) is None
    assert incoming.take(Frame("N", encode_list([b"A=b"]))) == [b"A=b"]
    assert (incoming.fields, incoming.words, incoming.part) == ({"verb": "run"}, [b"ls"], b"{}")
    for wrong in (head, Frame("X")):
        with pytest.raises(FrameError):
            incoming.take(wrong)
    with pytest.raises(FrameError):
        Incoming().take(Frame("N", encode_list([])))


def test_limits_that_are_not_in_force() -> None:
    """What the kernel does not keep is no promise of the receipt any more, and a notice names it."""
    planned = (
        "core dumps: off (LimitCORE=)",
        "memory_max 1G: unit (MemoryMax=), no swap",
        "tasks_max 5: unit (TasksMax=)",
    )
    assert without(planned, ()) == (planned, ())
    kept, lost = without(planned, ("TasksMax",))
    assert kept == (*planned[:2], "tasks_max 5: not in force")
    assert [words.partition(":")[0] for words in lost] == ["tasks_max 5 is not in force"]
    kept, lost = without(planned, ("MemorySwapMax",))
    assert kept[1] == "memory_max 1G: unit (MemoryMax=), and as much swap as there is"
    assert len(lost) == 1
