"""The data types of SSH, read and written: bytes, numbers, strings (RFC 4251, section 5).

Used by everything that looks into keys, signatures and messages of agents. It knows no message
and judges nothing; what cannot be read whole is an error, never a guess.
"""

from __future__ import annotations

_U32 = 4


class WireError(ValueError):
    """Bytes that are not what they should be. The text says what was expected."""


class Reader:
    """Reads one value after the other; none may reach beyond the end."""

    def __init__(self, data: bytes) -> None:
        """Begin at the first byte."""
        self._data = data
        self._at = 0

    def byte(self) -> int:
        """Return one byte."""
        return self._take(1)[0]

    def u32(self) -> int:
        """Return a `uint32`."""
        return int.from_bytes(self._take(_U32), "big")

    def u64(self) -> int:
        """Return a `uint64`."""
        return int.from_bytes(self._take(2 * _U32), "big")

    def boolean(self) -> bool:
        """Return a `boolean`; only 0 and 1 are taken, so that a value has one spelling."""
        value = self.byte()
        if value > 1:
            raise WireError("a boolean is 0 or 1")
        return bool(value)

    def string(self) -> bytes:
        """Return a `string`."""
        return self._take(self.u32())

    def text(self) -> str:
        """Return a `string` of printable ASCII: names of algorithms, methods, services."""
        data = self.string()
        if not all(0x20 < byte < 0x7F for byte in data):  # noqa: PLR2004  # visible ASCII
            raise WireError("a name holds bytes that are not visible ASCII")
        return data.decode("ascii")

    def number(self) -> int:
        """Return an `mpint` that is not negative."""
        data = self.string()
        if data[:1] >= b"\x80":
            raise WireError("a number is negative")
        return int.from_bytes(data, "big")

    @property
    def position(self) -> int:
        """How many bytes were read."""
        return self._at

    @property
    def rest(self) -> int:
        """How many bytes are left."""
        return len(self._data) - self._at

    def end(self) -> None:
        """Make sure that nothing is left.

        Raises:
            WireError: something is.
        """
        if self.rest:
            raise WireError(f"{self.rest} bytes too many")

    def _take(self, count: int) -> bytes:
        if count > self.rest:
            raise WireError("it ends too early")
        self._at += count
        return self._data[self._at - count : self._at]


def string(data: bytes) -> bytes:
    """Return bytes as a `string`."""
    return len(data).to_bytes(_U32, "big") + data
