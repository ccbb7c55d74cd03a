"""Redaction with patterns that backtrack without end: their own agent's calls are refused, and nobody waits."""

from __future__ import annotations

import asyncio
import json
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

import pytest
import uvloop

from cloister.llm.redact import Wish
from cloister.runs import redaction
from cloister.runs.redaction import SHORT_BYTES, Redaction
from support.model_rig import MESSAGE, Rig, Script, vanish

pytestmark = pytest.mark.kernel

SLOW = "(a+)+$"
TRAP = {**MESSAGE, "messages": [{"role": "user", "content": "a" * 60 + "!"}]}
SAFE = {**MESSAGE, "messages": [{"role": "user", "content": "say aaaa"}]}


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test in the event loop that the product uses."""

    async def bounded() -> None:
        async with asyncio.timeout(40):
            await test()

    uvloop.run(bounded())


async def longest_pause(over: asyncio.Event) -> float:
    """Return the longest time for which the event loop did nothing else."""
    longest = 0.0
    while not over.is_set():
        began = time.monotonic()
        await asyncio.sleep(0.01)
        longest = max(longest, time.monotonic() - began - 0.01)
    return longest


async def gone(pid: int) -> bool:
    """Wait until a process was ended and reaped."""
    for _ in range(200):
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8") as file:  # noqa: ASYNC230 - of the kernel
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except OSError:
            return True
        await asyncio.sleep(0.02)
    return False


def short(rig: Rig, wait_s: float = 1.0) -> Redaction:
    """Give a rig's redaction less time; return it."""
    assert rig.caller.redactor is not None
    rig.caller.redactor.close()
    rig.caller.redactor = made = Redaction(Wish(rig.llm.redact, rig.llm.redact_secrets, ""), wait_s)
    return made


def test_a_pattern_without_end_refuses_its_call_only() -> None:
    """The call is refused in time and never leaves, the event loop goes on meanwhile, and the next call works."""

    async def test() -> None:
        async with Script() as up, Rig(up.url, redact=(SLOW,)) as rig:
            redactor = short(rig, 2.0)
            assert (await rig.ask(SAFE)).status == 200
            assert b"say [redacted]" in up.asked[0].body
            process = redactor._process
            over = asyncio.Event()
            lag = asyncio.create_task(longest_pause(over))
            began = time.monotonic()
            reply = await rig.ask(TRAP)
            over.set()
            assert reply.status == 503
            assert reply.fields["x-cloister-reason"] == "redaction-slow"
            assert 1.5 < time.monotonic() - began < 4
            assert await lag < 0.5
            assert process is not None
            assert await gone(process.pid)
            assert (await rig.ask(SAFE)).status == 200
            assert len(up.asked) == 2
            assert [row.reason for row in rig.books.refusals] == ["redaction-slow"]

    run(test)


def test_one_agents_pattern_holds_up_no_other() -> None:
    """Each caller has a process of its own: another one's calls are redacted at their usual speed."""

    async def test() -> None:
        slow, quick = Redaction(Wish((SLOW,), False, ""), 3.0), Redaction(Wish(("hunter2",), False, ""), 3.0)
        trapped = asyncio.create_task(slow.aside(json.dumps(TRAP).encode()))
        try:
            await asyncio.sleep(0.3)
            for _ in range(5):
                assert await quick.aside(b'{"a": "hunter2"}') == (b'{"a": "[redacted]"}', 1)
            assert not trapped.done()
        finally:
            slow.close()
            quick.close()
            await trapped

    run(test)


def test_a_client_that_leaves_ends_the_work() -> None:
    """Its body is forgotten and the process ended; nothing was sent."""

    async def test() -> None:
        async with Script() as up, Rig(up.url, redact=(SLOW,)) as rig:
            redactor = short(rig, 20.0)
            _, writer = await rig.connect()
            writer.write(rig.request(TRAP))
            for _ in range(500):
                if redactor._process is not None:
                    break
                await asyncio.sleep(0.01)
            process = redactor._process
            assert process is not None
            vanish(writer)
            assert await gone(process.pid)
            assert rig.service.buffered == 0
            assert up.asked == []

    run(test)


def test_a_process_that_dies_is_replaced() -> None:
    """Killed between two calls: at most one is refused, and none leaves with what should have been taken out."""

    async def test() -> None:
        async with Script() as up, Rig(up.url, redact=("hunter[0-9]",)) as rig:
            redactor = short(rig, 5.0)
            message = {**MESSAGE, "system": "hunter2"}
            assert (await rig.ask(message)).status == 200
            process = redactor._process
            assert process is not None
            process.kill()
            await process.wait()
            replies = [await rig.ask(message) for _ in range(2)]
            assert replies[0].fields.get("x-cloister-reason", "") in {"", "redaction-failed"}
            assert replies[1].status == 200
            assert all(b"hunter2" not in asked.body for asked in up.asked)

    run(test)


def test_known_shapes_start_no_process() -> None:
    """`redact_secrets` alone is done at once for usual bodies; long ones go aside, with the same result."""

    async def test() -> None:
        redactor = Redaction(Wish((), True, "made-up-key"))
        body = json.dumps({"a": "cloister-x-" + "a" * 32, "b": "made-up-key"}).encode()
        done = b'{"a": "[redacted]", "b": "[redacted]"}'
        assert redactor.at_once(body) == (done, 2)
        assert redactor._process is None
        long = body[:-1] + b', "c": "' + b"x " * SHORT_BYTES + b'"}'
        assert redactor.at_once(long) is None
        found = await redactor.aside(long)
        assert isinstance(found, tuple)
        assert found[0].startswith(done[:-1])
        assert found[1] == 2
        redactor.close()

    run(test)


def test_no_key_is_in_its_command_line() -> None:
    """What the run presents reaches the process by its standard input; neither argv nor environment has it."""

    async def test() -> None:
        redactor = Redaction(Wish(("x",), True, "made-up-key"))
        assert await redactor.aside(b'{"a": "made-up-key"}') == (b'{"a": "[redacted]"}', 1)
        process = redactor._process
        assert process is not None
        with open(f"/proc/{process.pid}/cmdline", "rb") as file:  # noqa: ASYNC230 - of the kernel
            assert b"made-up" not in file.read()
        assert "made-up" not in repr(redactor.wish)
        redactor.close()
        assert await gone(process.pid)

    run(test)


@pytest.mark.parametrize(
    ("bound", "wish", "text"),
    [
        pytest.param("r.BODY_S = 0", {"patterns": [SLOW]}, "a" * 60 + "!", id="time"),
        pytest.param("r._MEMORY_BYTES = 200 << 20", {"patterns": ["."]}, "x" * 4_000_000, id="memory"),
    ],
)
def test_the_kernel_ends_it_also_without_its_broker(bound: str, wish: dict[str, object], text: str) -> None:
    """A broker that was killed meanwhile leaves nothing that runs on, and no list of matches fills the memory."""
    code = f"import sys; sys.path[:0] = {sys.path!r}\nimport cloister.services.redaction as r; {bound}; r.main()"
    words = json.dumps({"secrets": False, "key": "", **wish}).encode()
    body = json.dumps({"a": text}).encode()
    given = struct.pack(">I", len(words)) + words + struct.pack(">Q", len(body)) + body
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, timeout=30, check=False)
    assert done.returncode != 0
    assert done.stdout == b""
    assert time.monotonic() - began < 15


def test_its_module_is_there() -> None:
    """It is started by name; a wrong one would refuse every call, so this fails first."""
    done = subprocess.run([sys.executable, "-m", redaction.MODULE], input=b"", capture_output=True, timeout=30,
                          check=False)  # fmt: skip
    assert b"No module" not in done.stderr
