"""A client and a server of HTTP/2 for tests, made with the h2 library and nothing of ours."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, Self

from h2 import events
from h2.config import H2Configuration
from h2.connection import H2Connection
from relay_support import tunnel_tls

Answer = Callable[["H2Server", int, list[tuple[bytes, bytes]]], Awaitable[None]]


class H2Peer:
    """One end of a connection; every event ends up in a queue per stream, `events` has all."""

    def __init__(self, reader: Any, writer: Any, *, client: bool, strict: bool = True) -> None:
        self.reader, self.writer = reader, writer
        config = H2Configuration(
            client_side=client,
            header_encoding=None,
            validate_outbound_headers=strict,
            normalize_outbound_headers=strict,
        )
        self.h2 = H2Connection(config)
        self.queues: dict[int, asyncio.Queue] = {}
        self.events: list[Any] = []
        self.acknowledge = True
        self.closed = asyncio.Event()
        self.widened = asyncio.Event()
        self.task: asyncio.Task | None = None

    def begin(self) -> None:
        """Send the preface and read from now on."""
        self.h2.initiate_connection()
        self.flush()
        self.task = asyncio.get_running_loop().create_task(self.read())

    def flush(self) -> None:
        """Write what the library has to say."""
        self.writer.write(self.h2.data_to_send())

    async def read(self) -> None:
        """Read until the end."""
        try:
            while data := await self.reader.read(65536):
                for event in self.h2.receive_data(data):
                    self.took(event)
                self.flush()
        except (ConnectionError, ssl.SSLError):
            pass
        finally:
            self.closed.set()
            for queue in self.queues.values():
                queue.put_nowait(None)

    def took(self, event: Any) -> None:
        """Sort an event."""
        self.events.append(event)
        if isinstance(event, events.WindowUpdated):
            self.widened.set()
        if isinstance(event, events.DataReceived) and self.acknowledge:
            self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        number = getattr(event, "stream_id", None)
        if number:
            self.queues.setdefault(number, asyncio.Queue()).put_nowait(event)

    async def next(self, number: int) -> Any:
        """Return the next event of a stream."""
        return await asyncio.wait_for(self.queues.setdefault(number, asyncio.Queue()).get(), 10)

    async def send(self, number: int, data: bytes, *, end: bool = False) -> None:
        """Send a body, as the windows allow."""
        view = memoryview(data)
        while view:
            room = min(self.h2.local_flow_control_window(number), self.h2.max_outbound_frame_size, len(view))
            if not room:
                self.widened.clear()
                await asyncio.wait_for(self.widened.wait(), 10)
                continue
            self.h2.send_data(number, bytes(view[:room]))
            view = view[room:]
            self.flush()
            await self.writer.drain()
        if end:
            self.h2.end_stream(number)
            self.flush()


class H2TestClient(H2Peer):
    """A client inside a terminated tunnel."""

    @classmethod
    async def open(cls, relay: Any, host: str, port: int, context: ssl.SSLContext, **options: Any) -> Self:
        """CONNECT, TLS, preface."""
        reader, writer = await tunnel_tls(relay, host, port, context)
        client = cls(reader, writer, client=True, **options)
        client.begin()
        return client

    def request(self, method: str, authority: str, path: str, *extra: tuple[str, str], end: bool = True) -> int:
        """Send a request head; return its stream."""
        number = self.h2.get_next_available_stream_id()
        fields = [(":method", method), (":scheme", "https"), (":authority", authority), (":path", path), *extra]
        self.h2.send_headers(number, fields, end_stream=end)
        self.flush()
        return number

    async def response(self, number: int) -> tuple[int, dict[bytes, bytes], bytes, dict[bytes, bytes]]:
        """Return status, headers, body and trailers; -1 for a stream that was reset."""
        status, headers, body, trailers = 0, {}, [], {}
        while True:
            event = await self.next(number)
            if event is None or isinstance(event, events.StreamReset):
                return -1, headers, b"".join(body), trailers
            if isinstance(event, events.ResponseReceived):
                headers = dict(event.headers)
                status = int(headers[b":status"])
            elif isinstance(event, events.DataReceived):
                body.append(event.data)
            elif isinstance(event, events.TrailersReceived):
                trailers = dict(event.headers)
            elif isinstance(event, events.StreamEnded):
                return status, headers, b"".join(body), trailers

    async def close(self) -> None:
        """Leave."""
        self.writer.close()
        if self.task is not None:
            await asyncio.wait_for(self.task, 5)


class H2Server:
    """A server of HTTP/2: each request is answered by a coroutine."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.peers: list[H2Peer] = []
        self.tasks: set[asyncio.Task] = set()

    async def __call__(self, reader: Any, writer: Any) -> None:
        """Serve a connection."""
        peer = H2Peer(reader, writer, client=False)
        self.peers.append(peer)
        took = peer.took

        def sort(event: Any) -> None:
            if isinstance(event, events.RequestReceived):
                task = asyncio.get_running_loop().create_task(
                    self.answer(peer, event.stream_id, list(event.headers))  # type: ignore[arg-type]
                )
                self.tasks.add(task)
            took(event)

        peer.took = sort  # type: ignore[method-assign]
        peer.begin()
        await peer.closed.wait()
