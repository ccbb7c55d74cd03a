"""The chain of the log: every kind of damage is found, told apart, and told where; what is whole passes."""

import hashlib
import json

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.audit.chain import Chain, encode, genesis
from cloister.audit.event import Event
from support.audit_memory import LOG, MemoryLog, look, small_log


def kinds(log: MemoryLog, segments: list[tuple[int, list[bytes]]], **options: object) -> list[str]:
    """Return the kinds of damage that are found."""
    return [finding.kind for finding in look(log, segments, **options).findings]


def test_a_line_is_what_the_documentation_says() -> None:
    """Anybody can compute the hash of a line from its bytes and the hash before it."""
    chain = Chain(LOG)
    line = chain.line(encode(Event(time=1, kind="run.warned", message='a "quoted" \n word')))
    text, _, end = line.rpartition(b',"hash":"')
    start = hashlib.sha256(b"cloister-audit-v1:" + LOG.encode()).digest()
    assert genesis(LOG).hash == start
    assert end == hashlib.sha256(start + text).hexdigest().encode() + b'"}\n'
    assert json.loads(line)["seq"] == 1
    assert line.count(b"\n") == 1
    assert msgspec.json.decode(line, type=Event).message == 'a "quoted" \n word'


def test_a_whole_log_is_good() -> None:
    """Three segments, closed in order, verify with the public key alone; everything is signed."""
    log = small_log()
    report = look(log)
    assert report.good, report.findings
    assert (report.first, report.last, report.signed_to, report.lines) == (1, 28, 28, 28)
    assert (report.segments, report.heads, report.ending, report.log) == (3, 8, "closed", LOG)


def test_every_changed_line_is_found_where_it_is() -> None:
    """One letter of each line in turn: found, as changed, in its segment, at its line."""
    log = small_log()
    for place, (first, lines) in enumerate(log.segments):
        for number, line in enumerate(lines):
            damaged = log.copy()
            damaged[place][1][number] = line.replace(b'"time":1', b'"time":2', 1)
            report = look(log, damaged)
            assert [one.kind for one in report.findings][:1] == ["changed"], (place, number, report.findings)
            found = report.findings[0]
            assert (found.segment, found.line, found.seq) == (f"{first:016d}.jsonl", number + 1, first + number)


def test_every_removed_line_is_found() -> None:
    """Each line in turn is taken out, the last one too."""
    log = small_log()
    for place, (_, lines) in enumerate(log.segments):
        for number in range(len(lines)):
            damaged = log.copy()
            del damaged[place][1][number]
            report = look(log, damaged)
            assert not report.good, (place, number)
            last = place == 2 and number == len(lines) - 1
            assert ("truncated" if last else "removed") in {one.kind for one in report.findings}


def test_every_copied_or_foreign_line_is_found() -> None:
    """Each line stands twice; a made-up one is put in before each."""
    log = small_log()
    for place, (first, lines) in enumerate(log.segments):
        for number, line in enumerate(lines):
            twice = log.copy()
            twice[place][1].insert(number, line)
            assert kinds(log, twice) == ["inserted"], (place, number)
            if number:
                forged = log.copy()
                seq = b'{"seq":%d,' % (first + number)
                forged[place][1].insert(number, seq + b'"time":1,"kind":"run.warned","hash":"' + b"0" * 64 + b'"}')
                assert kinds(log, forged) == ["inserted"], (place, number)


def test_every_swap_is_found() -> None:
    """Each line changes places with its neighbour, and with a far one."""
    log = small_log()
    for place, (_, lines) in enumerate(log.segments):
        for number in range(1, len(lines) - 1):
            damaged = log.copy()
            block = damaged[place][1]
            block[number], block[number + 1] = block[number + 1], block[number]
            assert kinds(log, damaged)[0] == "reordered", (place, number)
            far = log.copy()
            far[place][1][1], far[place][1][-1] = far[place][1][-1], far[place][1][1]
            assert not look(log, far).good


def test_segments_removed_renamed_and_exchanged() -> None:
    """Without its first, middle or last segment, under another name, or in another order, it is not whole."""
    log = small_log()
    first, middle, last = log.copy()
    assert "removed" in kinds(log, [middle, last])
    assert kinds(log, [first, last]) == ["removed"]
    assert kinds(log, [first, middle]) == ["truncated"]
    assert "changed" in kinds(log, [first, (middle[0] + 1, middle[1]), last])
    assert not look(log, [middle, first, last]).good
    assert kinds(log, [], noted={}) == ["not-a-log"]


def test_a_cut_end_is_found_by_the_head_that_was_noted() -> None:
    """Cut after a valid head the lines alone look whole: HEAD, or a head noted elsewhere, tells."""
    log = small_log()
    cut = log.copy()[:2]
    del cut[1][1][-1]
    while b"log.head" not in cut[1][1][-1]:
        del cut[1][1][-1]
    assert kinds(log, cut) == ["truncated"]
    assert look(log, cut, noted={}).good, "this is what cannot be known without a noted head"
    elsewhere = look(log).tip.split(":")
    assert kinds(log, cut, noted={int(elsewhere[0]): elsewhere[1]}) == ["truncated"]


def test_lines_after_the_last_head_are_called_unsigned() -> None:
    """Somebody without the key who rewrites them is not found, and the report says how far signatures reach."""
    log = small_log()
    before = log.chain.position
    log.event("true.example.org")
    forged = log.copy()
    chain = Chain(LOG, before)
    forged[-1][1][-1] = chain.line(encode(Event(time=1, kind="run.warned")))[:-1]
    report = look(log, forged)
    assert report.good
    assert (report.last, report.signed_to) == (29, 28)


def test_a_chain_that_was_computed_anew_fails_at_the_next_head() -> None:
    """An attacker with write access and without the key changes a line and repairs every hash after it."""
    log = small_log()
    lines = [line for _, block in log.segments for line in block]
    chain = Chain(LOG)
    anew = []
    for line in lines:
        text = line[:-75].replace(b"api.example.org", b"evil.example.or") if len(anew) == 2 else line[:-75]
        anew.append(chain.line(b"{" + text.partition(b",")[2] + b"}")[:-1])
    report = look(log, [(1, anew)], noted={})
    assert {one.kind for one in report.findings} >= {"rewritten"}
    assert report.findings[0].kind == "rewritten"
    assert report.signed_to == 0


def test_another_keys_head_is_no_head() -> None:
    """A log signed throughout by somebody else's key does not verify; nor does one foreign head."""
    log = small_log()
    assert {"wrong-key", "head-missing"} <= set(kinds(small_log(seed=2), log.copy(), noted={}))
    log.event()
    log.head(Ed25519PrivateKey.from_private_bytes(b"x" * 32))
    assert kinds(log, log.copy(), noted={}) == ["wrong-key"]


def test_heads_that_were_cut_out_are_missed() -> None:
    """Without any valid head a log proves nothing; without one for long, neither."""
    log = MemoryLog()
    for _ in range(5):
        log.event()
    assert kinds(log, log.copy()) == ["head-missing"]
    log.head()
    assert look(log).good
    for _ in range(20_001):
        log.event()
    assert kinds(log, log.copy()) == ["head-missing"]


def test_a_new_key_is_trusted_by_the_word_of_the_old_one() -> None:
    """After rotation the first key is all a verifier needs; a key that nobody introduced stays foreign."""
    log = small_log()
    fresh = Ed25519PrivateKey.from_private_bytes(b"n" * 32)
    log.head(next_key=fresh.public_key().public_bytes_raw().hex())
    log.event()
    log.head(fresh)
    report = look(log)
    assert report.good, report.findings
    assert len(report.keys) == 2
    assert not look(small_log(seed=2), log.segments, noted={}).good


def test_old_segments_may_go_when_the_keeper_signed_it() -> None:
    """Retention is on record and signed; the same removal without a word is damage, also with an unsigned word."""
    log = small_log()
    log.own("log.retired", first=1, last=9, segments=1)
    unsigned = look(log, log.segments[1:])
    assert [one.kind for one in unsigned.findings] == ["removed"]
    log.head(why="retired")
    report = look(log, log.segments[1:])
    assert report.good, report.findings
    assert (report.first, report.retired_to) == (10, 9)
    assert kinds(log, log.segments[2:]) == ["removed"], "more is gone than was signed"


def test_clock_steps_are_told_and_are_no_damage() -> None:
    """Time that jumps back or ahead against the time since boot is a note, with its size and place."""
    log = small_log()
    log.pass_s(60, step_s=-7200)
    log.head()
    log.pass_s(60, step_s=86400)
    log.head()
    report = look(log)
    assert report.good
    assert report.notes == ["line 29: the clock was set by -7200.0 s", "line 30: the clock was set by +86400.0 s"]


def test_a_killed_keeper_is_told_as_what_it_is() -> None:
    """An open end is no damage; the next keeper's first word says what was before."""
    log = small_log()
    log.own("log.opened", after="killed", torn_bytes=3)
    log.event()
    report = look(log)
    assert report.good
    assert report.ending == "open"
    assert report.notes == ["line 29: the keeper before was killed, or the power was cut"]


@pytest.mark.parametrize(
    "line", [b"", b"{}", b"x" * 200, b'{"seq":5}', b'{"seq":01,"time":1,"hash":"' + b"0" * 64 + b'"}']
)
def test_what_is_no_line_is_damage(line: bytes) -> None:
    """Anything may stand in a file."""
    log = small_log()
    damaged = log.copy()
    damaged[1][1][2] = line
    assert not look(log, damaged).good
    damaged[1][1][2:2] = [log.segments[1][1][2]]
    assert kinds(
        log, [damaged[0], (damaged[1][0], [*log.segments[1][1][:2], line, *log.segments[1][1][2:]]), damaged[2]]
    )
