"""The TLS ClientHello, read just far enough to know which server the client asks for.

`HelloReader` takes bytes as they come, in records of any size (RFC 8446, sections 4.1.2 and
5.1; RFC 6066 for the server name), and keeps at most 32 KiB: post-quantum hellos are about
1.8 KB. It does not decrypt and does not verify. With Encrypted Client Hello (RFC 9849) only
the outer name can be seen; that is reported, since a GREASE extension looks the same.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

MAX_HELLO = 32 * 1024

_HANDSHAKE, _CLIENT_HELLO = 22, 1
_RECORD_HEADER, _MESSAGE_HEADER = 5, 4
_MAX_RECORD = 16 * 1024
_SERVER_NAME, _ENCRYPTED_CLIENT_HELLO = 0, 0xFE0D


class Hello(NamedTuple):
    """What the first bytes are. `broken` began like TLS and then was none, or was too long."""

    kind: Literal["tls", "not-tls", "broken"]
    server_name: str = ""
    """The name as sent, empty when there is none."""
    ech: bool = False


class HelloReader:
    """Collects a ClientHello. Feed until something other than None comes back."""

    def __init__(self) -> None:
        """Wait for the first byte."""
        self._raw = bytearray()
        self._message = bytearray()
        self._size = 0

    def feed(self, data: bytes) -> Hello | None:
        """Take more bytes; return what they are once that is certain."""
        self._size += len(data)
        self._raw += data
        while True:
            hello = self._record()
            if hello is not None:
                return hello
            if len(self._raw) < _RECORD_HEADER or len(self._raw) < self._record_end():
                break
            end = self._record_end()
            self._message += self._raw[_RECORD_HEADER:end]
            del self._raw[:end]
            hello = self._complete()
            if hello is not None:
                return hello
        return Hello("broken") if self._size > MAX_HELLO else None

    def _record(self) -> Hello | None:
        """Judge the header of the current record as far as it is there."""
        raw = self._raw
        if raw and raw[0] != _HANDSHAKE:
            return Hello("broken" if self._message else "not-tls")
        if len(raw) > 1 and raw[1] != 3:  # noqa: PLR2004 - the major version of SSL 3.0 to TLS 1.3
            return Hello("broken" if self._message else "not-tls")
        if len(raw) >= _RECORD_HEADER and not 0 < self._record_end() - _RECORD_HEADER <= _MAX_RECORD:
            return Hello("broken")
        return None

    def _record_end(self) -> int:
        """Return where the current record ends; its header must be there."""
        return _RECORD_HEADER + int.from_bytes(self._raw[3:5], "big")

    def _complete(self) -> Hello | None:
        """Parse the handshake message once all of it is there."""
        message = self._message
        if message[0] != _CLIENT_HELLO:
            return Hello("broken")
        if len(message) < _MESSAGE_HEADER:
            return None
        end = _MESSAGE_HEADER + int.from_bytes(message[1:4], "big")
        if end > MAX_HELLO:
            return Hello("broken")
        if len(message) < end:
            return None
        try:
            return _parse(bytes(message[_MESSAGE_HEADER:end]))
        except _MalformedError:
            return Hello("broken")


class _MalformedError(ValueError):
    """A length that points outside of its field."""


class _Field:
    """A field of the hello, read from the left."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def __bool__(self) -> bool:
        return self.at < len(self.data)

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise _MalformedError
        taken, self.at = self.data[self.at : end], end
        return taken

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "big")

    def vector(self, count: int) -> _Field:
        """Take a vector whose length is written in so many bytes."""
        return _Field(self.take(self.number(count)))


def _parse(body: bytes) -> Hello:
    """Parse the body of a ClientHello."""
    field = _Field(body)
    field.take(2 + 32)  # legacy_version, random
    field.vector(1)  # legacy_session_id
    field.vector(2)  # cipher_suites
    field.vector(1)  # legacy_compression_methods
    name, ech, seen = "", False, set()
    extensions = field.vector(2) if field else _Field(b"")
    if field:
        raise _MalformedError
    while extensions:
        kind, content = extensions.number(2), extensions.vector(2)
        if kind in seen:
            raise _MalformedError
        seen.add(kind)
        if kind == _SERVER_NAME:
            name = _server_name(content)
        ech = ech or kind == _ENCRYPTED_CLIENT_HELLO
    return Hello("tls", name, ech)


def _server_name(content: _Field) -> str:
    """Read the one host_name of the extension; more than one, or another type, is refused."""
    names = content.vector(2)
    kind, name = names.number(1), names.vector(2).data
    if content or names or kind != 0 or not name or not name.isascii():
        raise _MalformedError
    return name.decode("ascii")
