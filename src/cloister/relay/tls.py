"""TLS over a connection: one layer for both roles, between a transport and the protocol inside it.

The layer reads and writes through memory (ssl.MemoryBIO), so it can begin with bytes that came
ahead and works over any transport, also one through an upstream proxy. The protocol inside is
chosen when the handshake is over and sees a transport with the usual methods. A connection
that ends without a close_notify was cut off and is reported as an error, never as a complete
end (RFC 8446, section 6.1). What is trusted and who may connect is decided elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable

from cloister.relay.override import override
from cloister.relay.tunnel import as_transport

_BUFFER = memoryview(bytearray(256 * 1024))
"""Where records are decrypted before they are handed on; the loop has one thread, and nothing stays in it for later."""

_LINGER_S = 1.0

Choose = Callable[[str], asyncio.Protocol]
"""Makes the protocol inside, by the name that ALPN agreed on (empty when none was)."""


class TlsError(OSError):
    """A handshake that failed; the text is for people.

    Attributes:
        certificate: whether the other side's certificate was the reason.
    """

    def __init__(self, explanation: str, *, certificate: bool = False) -> None:
        """Keep both."""
        super().__init__(explanation)
        self.certificate = certificate


class TlsLayer(asyncio.Protocol):
    """The protocol of the outer transport."""

    transport: asyncio.Transport

    def __init__(self, context: ssl.SSLContext, choose: Choose, *, server_side: bool, host: str = "") -> None:
        """Take what to present and trust; as a client `host` is whose certificate is asked for and checked."""
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=host or None
        )
        self._choose = choose
        self._app: asyncio.Protocol | None = None
        self._inner = TlsTransport(self)
        self.closing = False
        """Whether the protocol inside has closed the connection."""
        self._paused = self._peer_done = self._closed = self._reading = self._over = False
        self._error: Exception | None = None
        self.ready: asyncio.Future[asyncio.Protocol] = asyncio.get_running_loop().create_future()
        """The protocol inside, once the handshake is over, or `TlsError`."""

    # The outer transport's side.

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the handshake."""
        self.transport = as_transport(transport)
        self._handshake()

    @override
    def data_received(self, data: bytes) -> None:
        """Decrypt."""
        if self._over or self._peer_done or self.closing:
            return
        self._incoming.write(data)
        if self._app is None:
            self._handshake()
        if self._app is not None:
            self._read()

    @override
    def eof_received(self) -> bool:
        """Take an end without close_notify for what it is: the connection was cut off."""
        if not self._peer_done and not self._closed:
            self._error = ConnectionResetError("the connection was cut off")
        return False

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the protocol inside, or whoever waits for the handshake."""
        self._over = True
        error = exc or self._error
        if not self.ready.done():
            self.ready.set_exception(TlsError("the connection was closed in the TLS handshake"))
            self.ready.exception()
        if self._app is not None:
            app, self._app = self._app, None
            app.connection_lost(error)

    @override
    def pause_writing(self) -> None:
        """Pass pressure on."""
        if self._app is not None:
            self._app.pause_writing()

    @override
    def resume_writing(self) -> None:
        """Pass relief on."""
        if self._app is not None:
            self._app.resume_writing()

    # What the inner transport asks for.

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt and send."""
        if self._over or self._closed or not data:
            return
        view = memoryview(data)
        try:
            while view:
                view = view[self._tls.write(view) :]
        except ssl.SSLError as error:
            self._break(error)
            return
        self._flush()

    def write_eof(self) -> None:
        """Send close_notify; the other direction stays open until its own."""
        if not self._closed and not self._over:
            self._closed = True
            with contextlib.suppress(ssl.SSLError):
                self._tls.unwrap()
            self._flush()

    def close(self) -> None:
        """Say goodbye and close once everything has been sent.

        The other side says goodbye too. A socket that is gone by then answers with a reset, which could
        overtake what was sent last: so what still comes is read away for a moment.
        """
        if self.closing:
            return
        self.closing = True
        self.write_eof()
        if self._peer_done or self.transport.is_closing() or not self.transport.can_write_eof():
            self.transport.close()
            return
        self.transport.write_eof()
        self.transport.resume_reading()
        asyncio.get_running_loop().call_later(_LINGER_S, self.transport.close)

    def pause(self, *, paused: bool) -> None:
        """Stop or go on reading; what was decrypted already is not held back for long."""
        if self._paused == paused or self._over or self.closing:
            return
        self._paused = paused
        if paused:
            self.transport.pause_reading()
        elif not self.transport.is_closing():
            self.transport.resume_reading()
            # Not at once: whoever resumes may be in the middle of something.
            asyncio.get_running_loop().call_soon(self._read)

    @property
    def protocol(self) -> asyncio.Protocol | None:
        """The protocol inside."""
        return self._app

    @protocol.setter
    def protocol(self, app: asyncio.Protocol) -> None:
        """Hand the connection to another protocol."""
        self._app = app

    # Inside.

    def _handshake(self) -> None:
        """Go on with the handshake as far as the bytes allow."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return
        except (ssl.SSLError, ssl.CertificateError) as error:
            self._flush()  # an alert
            self._over = True
            self.ready.set_exception(_explained(error))
            self.ready.exception()
            self.transport.close()
            return
        self._flush()
        if self.ready.cancelled():
            self.transport.abort()
            return
        self._app = self._choose(self._tls.selected_alpn_protocol() or "")
        self._app.connection_made(self._inner)
        self.ready.set_result(self._app)

    def _read(self) -> None:
        """Hand decrypted bytes on until there are no more, or the protocol inside wants none."""
        if self._reading:
            return
        self._reading = True
        try:
            while (app := self._taker()) is not None:
                size, ended = self._decrypt()
                if size:
                    app.data_received(bytes(_BUFFER[:size]))
                app = self._taker()
                if ended and app is not None:
                    self._peer_done = True
                    if not app.eof_received():
                        self.close()
                if not size:
                    break
        except ssl.SSLError as error:
            self._break(error)
        finally:
            self._reading = False

    def _taker(self) -> asyncio.Protocol | None:
        """Return the protocol inside if it takes bytes now."""
        return None if self._paused or self._over or self._peer_done or self.closing else self._app

    def _decrypt(self) -> tuple[int, bool]:
        """Fill the buffer; return how much is in it, and whether the other side said goodbye."""
        size = 0
        try:
            while size < len(_BUFFER):
                count = self._read_into(_BUFFER[size:])
                if not count:
                    return size, True
                size += count
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            return size, True
        self._flush()  # answers to key updates
        return size, False

    def _read_into(self, buffer: memoryview) -> int:
        """Decrypt into a buffer, at most one record."""
        read: Callable[[int, memoryview], int] = self._tls.read  # type: ignore[assignment] # with a buffer: a count
        return read(len(buffer), buffer)

    def _flush(self) -> None:
        """Send what TLS has to say."""
        if self._outgoing.pending and not self.transport.is_closing():
            self.transport.write(self._outgoing.read())

    def _break(self, error: Exception) -> None:
        """End a connection whose TLS is broken."""
        self._flush()
        self._error = ConnectionResetError(f"TLS failed: {_explained(error)}")
        self._closed = True
        self.transport.close()


class TlsTransport(asyncio.Transport):
    """The transport that the protocol inside sees."""

    def __init__(self, layer: TlsLayer) -> None:
        """Belong to a layer."""
        super().__init__()
        self._layer = layer

    @override
    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send."""
        self._layer.write(data)

    @override
    def can_write_eof(self) -> bool:
        """Each direction has its own close_notify."""
        return True

    @override
    def write_eof(self) -> None:
        """End this direction."""
        self._layer.write_eof()

    @override
    def close(self) -> None:
        """Close once everything has been sent."""
        self._layer.close()

    @override
    def abort(self) -> None:
        """Close at once."""
        self._layer.transport.abort()

    @override
    def is_closing(self) -> bool:
        """Whether the connection is on its way out."""
        return self._layer.closing or self._layer.transport.is_closing()

    @override
    def pause_reading(self) -> None:
        """Stop."""
        self._layer.pause(paused=True)

    @override
    def resume_reading(self) -> None:
        """Go on."""
        self._layer.pause(paused=False)

    @override
    def get_write_buffer_size(self) -> int:
        """Return how many encrypted bytes wait."""
        return self._layer.transport.get_write_buffer_size()

    @override
    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Leave the bounds as the layer has set them for the outer transport."""

    @override
    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Hand the connection to another protocol."""
        assert isinstance(protocol, asyncio.Protocol)  # noqa: S101 - streams only
        self._layer.protocol = protocol

    @override
    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return the protocol inside."""
        assert self._layer.protocol is not None  # noqa: S101 - a transport is given to a protocol
        return self._layer.protocol


def _explained(error: Exception) -> TlsError:
    """Return an error whose text says what was wrong, in OpenSSL's words without numbers of lines."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return TlsError(f"its certificate is not valid: {error.verify_message}", certificate=True)
    reason = getattr(error, "reason", None) or str(error)
    return TlsError(f"the TLS handshake failed: {str(reason).lower().replace('_', ' ')}")
