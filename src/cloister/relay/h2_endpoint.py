"""One end of an HTTP/2 connection: frames, flow control, pressure, and the limits against floods.

The h2 library keeps the protocol's state, this class moves bytes in bounded amounts: frames go to
the channel of their stream (`h2_channel`), and channels that want to send take turns. The
roles are `h2_server` and `h2_client`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from h2 import events
from h2.config import H2Configuration
from h2.errors import ErrorCodes
from h2.exceptions import H2Error
from h2.settings import SettingCodes, Settings
from hpack import HPACKError

from cloister.relay.h2_channel import Channel
from cloister.relay.h2_limits import Budget, FloodError, Machine
from cloister.relay.override import override
from cloister.relay.tunnel import as_transport

STREAM_WINDOW, CONNECTION_WINDOW = 256 * 1024, 4 * 1024 * 1024
"""Bytes that may be under way towards us: at most so much waits for a slow reader, per stream and in all."""
MAX_STREAMS = 100
MAX_HEAD = 64 * 1024
_DEFAULT_WINDOW = 65_535
_SLICE = 16 * 1024  # fed to the library at a time, so that a flood is noticed early
_ROUNDS = 8  # frames of each stream that are written at a time
_RESETS, _CONTROLS = (200.0, 20.0), (2000.0, 1000.0)
"""Streams that were reset, and frames that carry nothing: so many at once, and so many per second for ever."""


class Endpoint(asyncio.Protocol):
    """What both roles share."""

    transport: asyncio.Transport | None

    def __init__(self, *, client_side: bool) -> None:
        """Wait for the connection."""
        self.transport, self.client_side = None, client_side
        self.loop = asyncio.get_running_loop()
        self.channels: dict[int, Channel] = {}
        self.machine = Machine(H2Configuration(client_side=client_side, header_encoding=None))
        values = {
            SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
            SettingCodes.MAX_HEADER_LIST_SIZE: MAX_HEAD,
            SettingCodes.ENABLE_PUSH: 0,
        }
        self.machine.local_settings = Settings(client=client_side, initial_values=values)
        self._wanting: dict[Channel, None] = {}
        self._resets, self._controls = Budget(*_RESETS), Budget(*_CONTROLS)
        self._full = self._scheduled = self._feeding = False
        self._handlers: dict[type[events.Event], Callable[[Any], None]] = {
            events.DataReceived: self._took_data,
            events.TrailersReceived: self._took_trailers,
            events.StreamEnded: self._took_end,
            events.WindowUpdated: self._widened,
            events.RemoteSettingsChanged: self._widened,
            events.StreamReset: self._was_reset,
            events.ConnectionTerminated: self._terminated,
            events.RequestReceived: self.on_head,
            events.ResponseReceived: self.on_head,
            events.InformationalResponseReceived: self.on_head,
        }
        self.leaving = False
        """Whether no new stream will be taken: one side said so, or the connection is broken."""

    # The transport's side.

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send our settings."""
        self.transport = as_transport(transport)
        self.machine.initiate_connection()
        self.machine.increment_flow_control_window(CONNECTION_WINDOW - _DEFAULT_WINDOW)
        self.flush()

    @override
    def data_received(self, data: bytes) -> None:
        """Read frames; whoever breaks the rules is told so and cut off."""
        view = memoryview(data)
        self.flush()
        try:
            while view and not self.leaving_now():
                for event in self.machine.receive_data(view[:_SLICE]):
                    self._took(event)
                view = view[_SLICE:]
        except FloodError:
            self.machine.close_connection(ErrorCodes.ENHANCE_YOUR_CALM)
            self.break_off()
        except (H2Error, HPACKError):
            self.break_off()  # the library has put its GOAWAY into what is flushed
        except Exception as error:  # noqa: BLE001 - a bug of the library or ours must not leave a stream half open
            self.loop.call_exception_handler({"message": "HTTP/2 failed", "exception": error})
            self.break_off()
        self.flush()

    @override
    def eof_received(self) -> bool:
        """Close: nothing can be agreed upon any more."""
        return False

    @override
    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the same for every cause
        """Tell every stream."""
        self.transport = None
        self._give_up()

    @override
    def pause_writing(self) -> None:
        """Let everything wait. A client that does not read is not heard either: even answers to PING would pile up."""
        self._full = True
        if self.transport is not None and not self.client_side:
            self.transport.pause_reading()

    @override
    def resume_writing(self) -> None:
        """Go on."""
        self._full = False
        if self.transport is not None and not self.client_side:
            self.transport.resume_reading()
        self.flush()

    # For channels and roles.

    def wants(self, channel: Channel) -> None:
        """Note that a channel has something to send."""
        self._wanting[channel] = None
        self.soon()

    def soon(self) -> None:
        """Flush in a moment, so that a head, a body and their end make one record."""
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self.flush)

    def acknowledge(self, number: int, size: int) -> None:
        """Give bytes back to the sender's window."""
        if size and self.transport is not None and not self.leaving_now():
            self.machine.acknowledge_received_data(size, number)
            self.soon()

    def reset(self, channel: Channel, code: ErrorCodes) -> None:
        """End a stream from our side."""
        if not self.leaving_now():
            with contextlib.suppress(H2Error):  # it may have ended by itself in the same moment
                self.machine.reset_stream(channel.number, code)
        self.remove(channel)
        self.soon()

    def remove(self, channel: Channel) -> None:
        """Forget a stream that is over in both directions."""
        self._wanting.pop(channel, None)
        if self.channels.get(channel.number) is channel:
            del self.channels[channel.number]
            channel.drop()
        if self.leaving and not self.channels:
            self.loop.call_soon(self.break_off)  # the other side said goodbye, and all it owed has come

    def flush(self) -> None:
        """Send what can be sent: one frame of each stream in turn."""
        self._scheduled = False
        if self.transport is None:
            return
        try:
            while self._wanting and not self._full:
                for _ in range(_ROUNDS):
                    for channel in list(self._wanting):
                        self._send_one(channel)
                data = self.machine.data_to_send()
                if not data:
                    break
                self.transport.write(data)
        except H2Error:
            self.break_off()
        data = self.machine.data_to_send()
        if data:
            self.transport.write(data)

    def leaving_now(self) -> bool:
        """Whether the connection is gone or on its way out."""
        return self.transport is None or self.transport.is_closing()

    def break_off(self) -> None:
        """Say what has to be said and close."""
        if self.transport is not None and not self.transport.is_closing():
            data = self.machine.data_to_send()
            if data:
                self.transport.write(data)
            self.transport.close()
        self._give_up()

    def close(self) -> None:
        """Close at once."""
        self.leaving = True
        if self.transport is not None:
            self.transport.abort()

    # Inside.

    def _send_one(self, channel: Channel) -> None:
        """Send a frame of a channel; one that cannot go on waits for its window to be opened."""
        more = channel.send_some(self.machine)
        if not more:
            self._wanting.pop(channel, None)
        if channel.sent:
            self.on_sent(channel)

    def on_sent(self, channel: Channel) -> None:
        """Our end of a stream was sent."""
        if channel.received:
            self.finished_one()
            self.remove(channel)

    def on_head(self, event: events.Event) -> None:
        """Take a head: what it means depends on the role."""

    def _took(self, event: events.Event) -> None:
        """Sort out one event; one that no stream needs only costs work, and is counted."""
        handler = self._handlers.get(type(event))
        if handler is None:
            self._controls.spend(self.loop.time())
        else:
            handler(event)

    def _took_trailers(self, event: events.TrailersReceived) -> None:
        """Keep trailers until the end they announce."""
        channel = self.channels.get(event.stream_id)
        if channel is not None:
            channel.trailers = list(event.headers)

    def _took_end(self, event: events.StreamEnded) -> None:
        """Hand the end of a body on."""
        channel = self.channels.get(event.stream_id)
        if channel is None:
            return
        channel.received = True
        if channel.sent:
            self.finished_one()
            self.remove(channel)
        channel.taker.on_end(channel.trailers)

    def finished_one(self) -> None:
        """A stream was served to its end."""
        self._resets.refund()

    def _give_up(self) -> None:
        """Tell every stream that nothing more will come."""
        self.leaving = True
        self._wanting.clear()
        channels, self.channels = list(self.channels.values()), {}
        for channel in channels:
            channel.taker.on_reset(processed=True)

    def _took_data(self, event: events.DataReceived) -> None:
        """Hand a piece of a body on."""
        if not event.data and event.stream_ended is None:
            self._controls.spend(self.loop.time())
        channel = self.channels.get(event.stream_id)
        if channel is None:
            self.acknowledge(event.stream_id, event.flow_controlled_length)
        else:
            channel.arrived(event.data, event.flow_controlled_length)

    def _widened(self, event: events.WindowUpdated | events.RemoteSettingsChanged) -> None:
        """Let streams go on whose window was opened."""
        if isinstance(event, events.RemoteSettingsChanged):
            self._controls.spend(self.loop.time())
        elif event.stream_id:
            channel = self.channels.get(event.stream_id)
            if channel is not None:
                self.wants(channel)
            return
        for channel in self.channels.values():
            self.wants(channel)

    def _was_reset(self, event: events.StreamReset) -> None:
        """Tell a stream that it is gone. Dropped streams are counted against those that were served."""
        if not self.client_side:
            self._resets.spend(self.loop.time())
        channel = self.channels.get(event.stream_id)
        if channel is not None:
            self.remove(channel)
            channel.taker.on_reset(processed=event.error_code != ErrorCodes.REFUSED_STREAM)

    def _terminated(self, event: events.ConnectionTerminated) -> None:
        """Let streams end that are still worked on, and give the others up; a client goes on with all of its own."""
        self.leaving = True
        last = event.last_stream_id or 0
        lost = [channel for channel in self.channels.values() if channel.number > last] if self.client_side else []
        for channel in lost:
            self.remove(channel)
            channel.taker.on_reset(processed=False)
        if not self.channels:
            self.break_off()
