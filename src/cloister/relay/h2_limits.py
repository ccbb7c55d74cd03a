"""Limits against HTTP/2 traffic that only costs work, and the h2 library made to say goodbye properly."""

from __future__ import annotations

from h2.config import H2Configuration
from h2.connection import ConnectionInputs, ConnectionState, H2Connection, H2ConnectionStateMachine
from h2.events import Event

from cloister.relay.override import override


class FloodError(Exception):
    """The other side sends frames that only cost work (CVE-2023-44487 and its kin)."""


class Budget:
    """Allows a burst and then a rate."""

    def __init__(self, burst: float, rate: float) -> None:
        """Begin full; the rate is per second."""
        self._burst, self._rate = burst, rate
        self._left, self._at = burst, 0.0

    def spend(self, now: float) -> None:
        """Take one.

        Raises:
            FloodError: when there is none left.
        """
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1:
            raise FloodError
        self._left -= 1

    def refund(self) -> None:
        """Give one back: there was work that was wanted."""
        self._left = min(self._burst, self._left + 1)


class Machine(H2Connection):
    """The library's connection, which goes on with streams that the other side still works on after its GOAWAY.

    The library takes a GOAWAY for the end (and drops what waits to be sent); servers such as nginx
    send one after a number of requests and then answer those they have (RFC 9113, section 6.8).
    """

    @override
    def __init__(self, config: H2Configuration) -> None:
        """Take the library's configuration."""
        super().__init__(config)
        self.state_machine = _Patient()

    @override
    def clear_outbound_data_buffer(self) -> None:
        """Keep it."""


class _Patient(H2ConnectionStateMachine):
    """Stays open when the other side says that it takes no new streams."""

    @override
    def process_input(self, input_: ConnectionInputs) -> list[Event]:
        if input_ is ConnectionInputs.RECV_GOAWAY and self.state is not ConnectionState.CLOSED:
            return []
        return super().process_input(input_)
