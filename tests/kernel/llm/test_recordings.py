"""Recording model calls on real sockets: what is kept, what happens when it cannot be, and what it never holds."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from cloister.errors import DeniedError, UsageError
from cloister.runs.identity_store import IdentityStore
from cloister.runs.recordings import Bounds, Recorder
from cloister.runs.recordings_read import Recorded, Recording, read_recording
from support.model_rig import (
    ANSWER,
    DELTA,
    END,
    FINISH,
    KEY,
    MESSAGE,
    PLACEHOLDER,
    START,
    STREAM_HEAD,
    Rig,
    Script,
    chunk,
    reset,
    vanish,
    whole,
)  # fmt: skip

pytestmark = pytest.mark.kernel

RUN = "0123456789ab"
WRAPPING = bytes(range(32))
STREAM = {**MESSAGE, "stream": True}
WHOLE_STREAM = [STREAM_HEAD + chunk(START), chunk(DELTA) * 3, chunk(FINISH) + END]


class Kept:
    """A recording in a folder, and the events it wrote."""

    def __init__(self, folder: Path) -> None:
        """Name the file."""
        self.path = folder / "model-calls.sealed"
        self.events: list[tuple[str, dict[str, object]]] = []

    def attach(self, rig: Rig, bounds: Bounds | None = None) -> Recorder:
        """Record what a rig's caller says from now on."""
        soon = asyncio.get_running_loop().call_soon_threadsafe
        recorder = Recorder(str(self.path), RUN, WRAPPING, lambda *event: self.events.append(event), soon, bounds)
        rig.caller.recorder = recorder
        return recorder

    def read(self, bodies_of: str = "") -> Recording:
        """Open it."""
        recording = Recording()
        read_recording(str(self.path), RUN, WRAPPING, recording, bodies_of=bodies_of)
        return recording

    def calls(self) -> list[tuple[Recorded, list[bytes]]]:
        """Return every call with its bodies."""
        found = []
        for name in self.read().calls:
            one = self.read(name).calls[name]
            found.append((one, [bytes(data) for _, data in one.bodies]))
        return found


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    """Return where a test's calls are kept."""
    return Kept(tmp_path)


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test in the event loop that the product uses."""

    async def bounded() -> None:
        async with asyncio.timeout(40):
            await test()

    uvloop.run(bounded())


async def done(recorder: Recorder) -> None:
    """Close a recording and wait for its thread."""
    recorder.finish()
    await asyncio.get_running_loop().run_in_executor(None, recorder.join, 10)
    assert not recorder.alive


def test_what_was_said_is_kept_as_it_was_said(kept: Kept) -> None:
    """The request as it left, after redaction; a whole answer and a stream, byte for byte; whose they are, and when."""

    async def test() -> None:
        streamed = [STREAM_HEAD + chunk(START), chunk(DELTA) * 3, chunk(FINISH) + END]
        answer = whole(fields="request-id: req_42\r\n")
        async with Script([answer], streamed) as up, Rig(up.url, redact=("hunter[0-9]",)) as rig:
            recorder = kept.attach(rig)
            message = {**MESSAGE, "messages": [{"role": "user", "content": "my word is hunter2"}]}
            assert (await rig.ask(message)).status == 200
            stream = await rig.ask(STREAM)
            assert stream.clean
            await rig.settled(2)
            await done(recorder)
            (first, bodies), (second, more) = kept.calls()
            assert bodies == [up.asked[0].body, ANSWER]
            assert b"[redacted]" in bodies[0]
            assert more == [up.asked[1].body, stream.body]
            assert (first.model, first.provider, first.route, first.status) == ("claude-x", "up0", "messages", 200)
            assert first.answers[0]["request_id"] == "req_42"
            assert (first.outcome, first.whole, second.stream) == ("complete", True, True)
            assert abs(first.time - time.time()) < 60
            assert [row.id for row in rig.books.rows] == [first.call, second.call]
            assert kept.read().closed
            assert kept.events == []
            assert recorder.summary() == ("2 model calls were recorded [recorded]",)

    run(test)


def test_no_key_is_in_it(kept: Kept) -> None:
    """Neither the real key nor the placeholder, sealed or opened: names of head fields are kept, values are not."""

    async def test() -> None:
        async with Script() as up, Rig(up.url) as rig:
            recorder = kept.attach(rig)
            assert (await rig.ask(anthropic_version="2023-06-01")).status == 200
            await done(recorder)
            ((one, bodies),) = kept.calls()
            opened = repr(one).encode() + b"".join(bodies)
            for secret in (KEY.encode(), PLACEHOLDER.encode(), WRAPPING):
                assert secret not in opened + kept.path.read_bytes()
            assert up.asked[0].field("x-api-key") == [KEY]
            assert {"x-api-key", "anthropic-version"} <= set(one.request_fields)
            assert b"claude-x" not in kept.path.read_bytes()
            assert kept.path.stat().st_mode & 0o777 == 0o600

    run(test)


def test_every_attempt_is_kept(kept: Kept) -> None:
    """An answer that the agent never saw, because another attempt followed, is in the record too."""

    async def test() -> None:
        overloaded = whole(b'{"error": "busy"}', "529 Overloaded", "retry-after: 0\r\n")
        async with Script([overloaded], [whole()]) as up, Rig(up.url, provider={"retries": 1}) as rig:
            recorder = kept.attach(rig)
            assert (await rig.ask()).status == 200
            await done(recorder)
            ((one, bodies),) = kept.calls()
            assert [(about["status"], about["attempt"]) for about in one.answers] == [(529, 1), (200, 2)]
            assert bodies == [up.asked[0].body, b'{"error": "busy"}', ANSWER]

    run(test)


def test_parallel_calls_are_not_mixed(kept: Kept) -> None:
    """Forty streams at once, each with words of its own, end up each with its own."""

    async def test() -> None:
        async with Rig("http://127.0.0.1:9") as rig:
            recorder = kept.attach(rig)
            names = [f"{index:026d}" for index in range(40)]

            async def one(name: str) -> None:
                about: dict[str, Any] = {"time": 1.0, "model": "m", "provider": "p", "route": "r", "stream": True}
                recorder.begin(name, {**about, "fields": []}, b"request " + name.encode())
                recorder.head(name, {"status": 200, "provider": "p", "request_id": "", "fields": [], "attempt": 1})
                for piece in range(50):
                    recorder.answer(name, b"%b-%d;" % (name.encode(), piece))
                    await asyncio.sleep(0)
                recorder.end(name, {"outcome": "complete"})

            await asyncio.gather(*map(one, names))
            await done(recorder)
        found = kept.calls()
        assert [one.call for one, _ in found] == names
        for one, (request, answer) in found:
            assert request == b"request " + one.call.encode()
            assert answer == b"".join(b"%b-%d;" % (one.call.encode(), piece) for piece in range(50))

    run(test)


@pytest.mark.parametrize("how", ["upstream", "client"])
def test_a_stream_that_breaks_is_kept_as_far_as_it_came(kept: Kept, how: str) -> None:
    """What arrived is there, and its outcome says that it was not all."""

    async def test() -> None:
        steps = [STREAM_HEAD + chunk(START), reset] if how == "upstream" else [STREAM_HEAD + chunk(START), 5.0]
        async with Script(steps) as up, Rig(up.url) as rig:
            recorder = kept.attach(rig)
            reader, writer = await rig.connect()
            writer.write(rig.request(STREAM))
            await reader.readuntil(b"message_start")
            if how == "client":
                vanish(writer)
                await asyncio.sleep(0.1)
                await rig.service.close()
            rows = await rig.settled()
            writer.close()
            await done(recorder)
            ((one, bodies),) = kept.calls()
            assert bodies[1] == START
            assert one.outcome == rows[0].outcome != "complete"

    run(test)


def test_a_long_answer_is_kept_within_its_bound(kept: Kept) -> None:
    """100 MB pass whole and quickly; 64 MiB of them are kept, and the record says that there was more."""

    async def test() -> None:
        size = 100_000_000
        async with Script([whole(bytes(size))]) as up, Rig(up.url) as rig:
            recorder = kept.attach(rig)
            reader, writer = await rig.connect()
            writer.write(rig.request())
            await reader.readuntil(b"\r\n\r\n")
            got = 0
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            while got < size:
                data = await reader.read(1 << 20)
                assert data
                got += len(data)
            writer.close()
            await rig.settled()
            await done(recorder)
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024
            one = next(iter(kept.read().calls.values()))
            assert (one.answer_bytes, one.answer_kept, one.whole) == (size, 64 << 20, False)
            assert "not whole" in recorder.summary()[1]

    run(test)


def test_the_bound_of_a_run_is_said_and_refuses_nothing(kept: Kept) -> None:
    """Beyond it calls go on and are listed, without bodies; the run's events say so once."""

    async def test() -> None:
        async with Script() as up, Rig(up.url) as rig:
            recorder = kept.attach(rig, Bounds(run=len(ANSWER)))
            for _ in range(3):
                assert (await rig.ask()).status == 200
            await done(recorder)
            calls = list(kept.read().calls.values())
            assert len(calls) == 3
            assert not any(one.whole for one in calls)
            assert sum(one.request_kept + one.answer_kept for one in calls) <= len(ANSWER)
            assert [kind for kind, _ in kept.events] == ["recording-full"]

    run(test)


class FullDisk:
    """A file on a disk that is full after some bytes."""

    def __init__(self, room: int) -> None:
        """Have so much room."""
        self.room = room

    def append(self, piece: bytes) -> None:
        """Write, or fail as write(2) does."""
        if len(piece) > self.room:
            raise OSError(28, "No space left on device")
        self.room -= len(piece)

    def close(self) -> None:
        """Close."""


def test_a_full_disk_ends_the_calls(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call under way is not disturbed; the next one is refused before anything is sent, and the event says why."""

    async def test() -> None:
        async with Script() as up, Rig(up.url) as rig:
            monkeypatch.setattr("cloister.host.recordings.Appendix", lambda _: FullDisk(400))
            recorder = kept.attach(rig)
            assert (await rig.ask()).status == 200
            while not recorder.failed:  # noqa: ASYNC110 - another thread sets it
                await asyncio.sleep(0.01)
            for _ in range(2):
                reply = await rig.ask()
                assert reply.status == 503
                assert reply.fields["x-cloister-reason"] == "recording-failed"
                assert b"No space left" in reply.body
            assert len(up.asked) == 1
            assert kept.events == [("recording-failed", {"what": "No space left on device"})]
            assert [row.reason for row in rig.books.refusals][:1] == ["recording-failed"]
            await done(recorder)
            assert "[recording-failed]" in recorder.summary()[1]

    run(test)


def test_a_really_full_disk_leaves_a_file_that_opens(kept: Kept) -> None:
    """A write that the system cuts in the middle (RLIMIT_FSIZE) is taken back: what was whole before opens."""
    code = f"""
import resource, signal, sys, time
sys.path[:0] = {sys.path!r}
from cloister.runs.recordings import Recorder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
recorder = Recorder({str(kept.path)!r}, {RUN!r}, bytes(range(32)), print, lambda call, *words: call(*words))
about = dict(time=1.0, model="m", provider="p", route="r", stream=False, fields=[])
recorder.begin("A" * 26, about, b"one")
recorder.end("A" * 26, dict(outcome="complete"))
recorder.begin("B" * 26, about, b"x" * 9000)
recorder.end("B" * 26, dict(outcome="complete"))
while recorder.alive and not recorder.failed:
    time.sleep(0.01)
recorder.finish()
recorder.join(10)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert "recording-failed" in shown.stdout
    recording = kept.read("A" * 26)
    assert not recording.closed
    assert bytes(recording.calls["A" * 26].bodies[0][1]) == b"one"
    assert recording.calls["A" * 26].whole
    assert not recording.calls["B" * 26].whole


def test_a_file_that_cannot_be_made_allows_no_call(kept: Kept) -> None:
    """Something stands in its place, even a link to elsewhere: it is not touched, and nothing is sent unrecorded."""

    async def test() -> None:
        elsewhere = kept.path.with_name("elsewhere")
        elsewhere.write_text("mine")
        kept.path.symlink_to(elsewhere)
        async with Script() as up, Rig(up.url) as rig:
            recorder = kept.attach(rig)
            assert (await rig.ask()).status == 503
            assert up.asked == []
            await done(recorder)
        assert elsewhere.read_text() == "mine"
        assert [kind for kind, _ in kept.events] == ["recording-failed"]

    run(test)


def test_a_disk_that_stays_behind_counts_as_failed(kept: Kept) -> None:
    """Memory is bounded: what is not written in time ends the recording instead of growing."""

    async def test() -> None:
        async with Script() as up, Rig(up.url) as rig:
            recorder = kept.attach(rig, Bounds(waiting=100))
            reply = await rig.ask({**MESSAGE, "system": "x" * 200})
            assert reply.status == 503
            assert up.asked == []
            assert recorder.failed
            await done(recorder)

    run(test)


def test_killed_at_any_moment_it_opens_as_far_as_it_was_written(kept: Kept) -> None:
    """SIGKILL in the middle of writing: complete pieces open, and the missing end is said."""
    code = f"""
import sys, time
sys.path[:0] = {sys.path!r}
from cloister.runs.recordings import Recorder
recorder = Recorder({str(kept.path)!r}, {RUN!r}, bytes(range(32)), print, lambda call, *words: call(*words))
about = dict(time=1.0, model="m", provider="p", route="r", stream=False, fields=[])
for number in range(100000):
    name = f"{{number:026d}}"
    recorder.begin(name, about, b"x" * 2000)
    recorder.end(name, dict(outcome="complete"))
    if number == 200:
        print("going", flush=True)
    time.sleep(0.0005)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    recording = kept.read()
    assert not recording.closed
    assert len(recording.calls) > 100
    assert all(one.whole for one in list(recording.calls.values())[:-1])


def test_the_key_outlives_a_change_of_the_master_key(kept: Kept, tmp_path: Path) -> None:
    """`cloister identity rotate-master` takes no recording away; another user's key store opens none."""
    store = IdentityStore(str(tmp_path / "identity"), {})
    wrapping = store.derive("llm-recordings")
    recorder = Recorder(str(kept.path), RUN, wrapping, print, lambda call, *words: call(*words))
    recorder.begin("A" * 26, {"time": 1.0, "model": "m", "provider": "p", "route": "r", "stream": False, "fields": []},
                   b"words")  # fmt: skip
    recorder.end("A" * 26, {"outcome": "complete"})
    recorder.finish()
    recorder.join(10)
    store.rotate_master()

    again = IdentityStore(str(tmp_path / "identity"), {}).derive("llm-recordings")
    recording = Recording()
    read_recording(str(kept.path), RUN, again, recording)
    assert recording.closed
    with pytest.raises(DeniedError, match="not sealed with this user's key"):
        read_recording(str(kept.path), RUN, IdentityStore(str(tmp_path / "other"), {}).derive("llm-recordings"),
                       Recording())  # fmt: skip


def test_only_its_owner_reads_it(kept: Kept) -> None:
    """A file that others could write or read, a link, or none: each is a clear error."""
    Recorder(str(kept.path), RUN, WRAPPING, print, lambda call, *words: call(*words)).finish()
    time.sleep(0.1)
    assert kept.read().closed
    kept.path.chmod(0o640)
    with pytest.raises(DeniedError, match="belongs to its owner alone"):
        kept.read()
    kept.path.chmod(0o600)
    if os.getuid() == 0:
        os.chown(kept.path, 4242, 4242)
        with pytest.raises(DeniedError, match="belongs to its owner alone"):
            kept.read()
    kept.path.unlink()
    with pytest.raises(UsageError, match="no model calls"):
        kept.read()


def test_without_a_record_nothing_of_it_is_imported() -> None:
    """A run that has models and records nothing brings neither this nor cryptography for it."""
    code = (
        "import sys, cloister.relay.llm.entry, cloister.runs.models, cloister.runs.model_calls;"
        "print(*[name for name in sys.modules if name.split('.')[-1] in ('recorded', 'recording', 'recordings')],"
        "'cryptography' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True,
                           env={"PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
    assert shown.stdout.split() == ["False"]
