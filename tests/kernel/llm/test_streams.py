"""Streams of the inference proxy on real sockets: each event at once, each break told, everything counted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import uvloop

from cloister.llm.errors import Refusal
from cloister.relay.llm.service import Bounds
from support.model_rig import (
    DELTA,
    END,
    FINISH,
    MESSAGE,
    START,
    STREAM_HEAD,
    Rig,
    Script,
    chunk,
    event,
    hang_up,
    read_reply,
    reset,
    vanish,
    whole,
)  # fmt: skip

pytestmark = pytest.mark.kernel

Test = Callable[[], Awaitable[None]]
STREAM = {**MESSAGE, "stream": True}
CHAT = {"model": "gpt-x", "max_tokens": 50, "messages": []}
WHOLE_STREAM = [STREAM_HEAD + chunk(START), chunk(DELTA) * 3, chunk(FINISH) + END]


def run(test: Test) -> None:
    """Run a test in the event loop that the product uses."""

    async def bounded() -> None:
        async with asyncio.timeout(30):
            await test()

    uvloop.run(bounded())


def test_a_stream_passes_in_its_own_pieces() -> None:
    """An event is with the client before the next one exists, and its bytes are the upstream's."""

    async def test() -> None:
        steps = [STREAM_HEAD + chunk(START), 0.3, chunk(DELTA), 0.3, chunk(FINISH) + END]
        async with Script(steps) as up, Rig(up.url) as rig:
            reader, writer = await rig.connect()
            writer.write(rig.request(STREAM))
            begun = asyncio.get_running_loop().time()
            await reader.readuntil(b"message_start")
            assert asyncio.get_running_loop().time() - begun < 0.25
            vanish(writer)
            reply = await rig.ask(STREAM)
            assert (reply.body, reply.clean) == (START + DELTA + FINISH, True)
            rows = await rig.settled(2)
            assert [(row.input_tokens, row.output_tokens, row.source) for row in rows] == [(11, 5, "provider")] * 2
            assert [row.outcome for row in rows] == ["client-left", "complete"]

    run(test)


def test_a_client_that_leaves_is_counted_to_the_end() -> None:
    """LiteLLM #30667: the answer is read on, so that its usage is the upstream's and no estimate."""

    async def test() -> None:
        async with Script([STREAM_HEAD + chunk(START), 0.2, chunk(FINISH) + END]) as up, Rig(up.url) as rig:
            reader, writer = await rig.connect()
            writer.write(rig.request(STREAM))
            await reader.readuntil(b"message_start")
            vanish(writer)
            (row,) = await rig.settled()
            assert (row.outcome, row.source, row.output_tokens) == ("client-left", "provider", 5)

    run(test)


def test_reading_on_is_bounded_in_bytes_too() -> None:
    """An upstream that floods after its client left is closed."""

    async def test() -> None:
        steps = [STREAM_HEAD + chunk(START), 0.2] + [chunk(event({"x": "y" * 60_000})), 0.01] * 200
        async with Script(steps) as up, Rig(up.url, bounds=Bounds(drain_bytes=500_000)) as rig:
            reader, writer = await rig.connect()
            writer.write(rig.request(STREAM))
            await reader.readuntil(b"message_start")
            vanish(writer)
            (row,) = await rig.settled()
            assert (row.outcome, row.source) == ("client-left", "estimated")
            await up.hung_up.wait()

    run(test)


def test_reading_on_has_an_end() -> None:
    """An upstream that goes on for ever is closed, and what arrived is estimated."""

    async def test() -> None:
        steps = [STREAM_HEAD + chunk(START)] + [chunk(DELTA), 0.05] * 100
        async with Script(steps) as up, Rig(up.url, bounds=Bounds(drain_s=0.2, heartbeat_s=0.1)) as rig:
            reader, writer = await rig.connect()
            writer.write(rig.request(STREAM))
            await reader.readuntil(b"message_start")
            writer.close()
            (row,) = await rig.settled()
            assert (row.outcome, row.source, row.input_tokens) == ("client-left", "estimated", 11)
            assert row.output_tokens > 5
            await up.hung_up.wait()

    run(test)


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("cuts", [1, 7, 10_000])
def test_usage_of_chat_streams_is_asked_for_and_hidden(asks: bool, cuts: int) -> None:
    """The chunk that brings it is seen by an agent that asked for it, and by no other; all else is untouched."""
    first = event({"choices": [{"delta": {"content": "a"}}], "usage": None})
    last = event({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": None})
    usage = event({"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": 4}})
    done = event("[DONE]")
    every = first + last + usage + done
    pieces = [chunk(every[index : index + cuts]) for index in range(0, len(every), cuts)]

    async def test() -> None:
        async with Script([STREAM_HEAD, *pieces, END]) as up, Rig(up.url, provider={"protocol": "openai"}) as rig:
            options = {"stream_options": {"include_usage": True}} if asks else {}
            reply = await rig.ask({**CHAT, "stream": True, **options}, "/v1/chat/completions")
            assert up.asked[0].json["stream_options"] == {"include_usage": True}
            assert reply.body == (every if asks else first + last + done)
            assert reply.clean
            (row,) = await rig.settled()
            assert (row.input_tokens, row.output_tokens, row.source) == (30, 4, "provider")

    run(test)


@pytest.mark.parametrize("last", [hang_up, reset], ids=["closed", "reset"])
def test_a_stream_that_breaks_ends_in_an_error(last: Callable) -> None:
    """OpenShell #866: an error event, no clean end, and what arrived is estimated."""

    async def test() -> None:
        async with Script([STREAM_HEAD + chunk(START), chunk(DELTA), 0.05, last]) as up, Rig(up.url) as rig:
            reply = await rig.ask(STREAM)
            assert reply.body.startswith(START + DELTA)
            assert reply.body.rpartition(b"event: error\ndata: ")[2].startswith(b'{"type":"error"')
            assert not reply.clean
            (row,) = await rig.settled()
            assert (row.outcome, row.source, row.input_tokens) == ("truncated", "estimated", 11)
            assert row.output_tokens >= 2

    run(test)


def test_a_stream_without_its_last_word_is_broken() -> None:
    """Whatever the framing says: a clean end of an answer that is not complete would be believed."""

    async def test() -> None:
        async with Script([STREAM_HEAD + chunk(START) + chunk(DELTA) + END]) as up, Rig(up.url) as rig:
            reply = await rig.ask(STREAM)
            assert b"event: error" in reply.body
            assert not reply.clean

    run(test)


def test_silence_has_limits_and_the_whole_has_none() -> None:
    """OpenShell #641: a stream may last, as long as it is not silent for `idle_timeout`."""

    async def test() -> None:
        slow = [STREAM_HEAD + chunk(START), *([0.3, chunk(DELTA)] * 5), chunk(FINISH) + END]
        async with Script(slow) as up, Rig(up.url, provider={"idle_timeout": "1s"}) as rig:
            assert (await rig.ask(STREAM)).clean
        async with Script([STREAM_HEAD + chunk(START), 9.0]) as up, Rig(up.url, provider={"idle_timeout": "1s"}) as rig:
            reply = await rig.ask(STREAM)
            assert b"was silent" in reply.body
            assert not reply.clean

    run(test)


def test_a_long_silence_is_filled_with_comments() -> None:
    """Between events only, and never inside one."""

    async def test() -> None:
        steps = [STREAM_HEAD + chunk(START), 0.5, chunk(DELTA[:9]), 0.5, chunk(DELTA[9:] + FINISH) + END]
        async with Script(steps) as up, Rig(up.url, bounds=Bounds(heartbeat_s=0.1)) as rig:
            reply = await rig.ask(STREAM)
            assert reply.body.count(b": cloister waits\n\n") >= 1
            assert reply.body.replace(b": cloister waits\n\n", b"") == START + DELTA + FINISH
            assert DELTA in reply.body
            assert reply.clean

    run(test)


def test_a_slow_client_slows_the_upstream() -> None:
    """Memory stays bounded: what the client does not read is not fetched; silence of the client is no timeout."""

    async def test() -> None:
        piece = chunk(event({"type": "ping", "x": "y" * 60_000}))
        steps = [STREAM_HEAD + chunk(START), *([piece] * 400), chunk(FINISH) + END]
        async with Script(steps) as up, Rig(up.url, provider={"idle_timeout": "2s"}) as rig:
            reader, writer = await rig.connect()
            reader._limit = 1000
            writer.transport.pause_reading()
            writer.write(rig.request(STREAM))
            await asyncio.sleep(3.0)
            assert len(rig.service.calls) == 1
            writer.transport.resume_reading()
            reader._limit = 1 << 26
            reply = await read_reply(reader)
            assert reply.clean
            assert len(reply.body) > 24_000_000
            writer.close()

    run(test)


def test_a_blocked_agent_is_ended_in_mid_stream() -> None:
    """The kill switch does not wait for a stream to end; the next request is refused, and unblocking lets go."""

    async def test() -> None:
        steps = [STREAM_HEAD + chunk(START), 5.0, chunk(FINISH) + END]
        async with Script(steps, [whole()]) as up, Rig(up.url) as rig:
            reader, writer = await rig.connect()
            writer.write(rig.request(STREAM))
            await asyncio.sleep(0.2)
            rig.account.blocked = "by a test"
            for call in list(rig.service.calls):
                call.cut(Refusal(403, "agent-blocked", "blocked by a test", again=False))
            reply = await read_reply(reader)
            assert b"blocked by a test" in reply.body
            assert not reply.clean
            writer.close()
            refused = await rig.ask()
            assert (refused.status, refused.fields["x-cloister-reason"]) == (403, "agent-blocked")
            rig.account.blocked = ""
            assert (await rig.ask()).status == 200
            await up.hung_up.wait()

    run(test)
