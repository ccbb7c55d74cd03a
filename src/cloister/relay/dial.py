"""From an allowed target to a connection: resolve, judge every address, dial a judged one.

Names are looked up here and only here, after the policy has allowed them, and what is dialled
is the very address that was judged, so a second answer of the DNS changes nothing. Addresses
are tried in the resolver's order with the families interleaved, the next one starting after
250 ms (RFC 8305, simplified). Through an upstream proxy the proxy resolves: `via` then says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest
from socket import IPPROTO_TCP, SOCK_STREAM
from typing import NamedTuple, TypeVar

from cloister.egress.decision import Target, Verdict
from cloister.egress.hosts import HOST_LOOPBACK_NAME, Address, parse_address
from cloister.egress.http1 import HttpError, parse_proxy_reply
from cloister.relay.gate import Gate
from cloister.relay.override import override
from cloister.relay.session import RefusedError, Resolver, Session, UpstreamProxy, failed

STAGGER_S = 0.25
_LOOPBACK = "127.0.0.1"
_OK = range(200, 300)

P = TypeVar("P", bound=asyncio.Protocol)


class Line(NamedTuple):
    """An open connection to a server: the address that was dialled, or the proxy it goes through."""

    address: str
    via: str = ""


class SystemResolver:
    """getaddrinfo(3) in the loop's thread pool: hosts file, search domains and DNS as the host has them."""

    async def resolve(self, name: str, port: int) -> Sequence[str]:
        """Return the addresses in the order of RFC 6724."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(name, port, type=SOCK_STREAM, proto=IPPROTO_TCP)
        return [str(entry[4][0]) for entry in found]


class Dialer:
    """Opens connections for one run."""

    def __init__(self, session: Session, gate: Gate) -> None:
        """Use the session's resolver, upstream proxy and limits."""
        self._resolver: Resolver = session.resolver or SystemResolver()
        self._upstream = session.upstream
        self._timeout_s = session.limits.connect_timeout_s
        self._gate = gate
        self._lookups = asyncio.Semaphore(session.limits.lookups)

    async def dial(self, target: Target, factory: Callable[[], P]) -> tuple[P, Line]:
        """Connect to an allowed target; the protocol made by `factory` is connected when this returns.

        Raises:
            RefusedError: when every address is refused, or nothing answers in time.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                if self._upstream is not None and not self._goes_direct(self._upstream, target):
                    return await self._through(self._upstream, target, factory), Line("", self._upstream.name)
                return await self._direct(target, factory)
        except TimeoutError:
            raise failed("connect-timeout", f"{target.authority} did not answer in {self._timeout_s:g} s") from None

    @staticmethod
    def _goes_direct(proxy: UpstreamProxy, target: Target) -> bool:
        """Say whether a target is reached without the upstream proxy: the host's own loopback always is."""
        return target.host.text == HOST_LOOPBACK_NAME or proxy.direct.covers(target.host, target.port)

    async def _direct(self, target: Target, factory: Callable[[], P]) -> tuple[P, Line]:
        """Resolve, judge, connect."""
        if target.host.text == HOST_LOOPBACK_NAME:
            addresses = [_LOOPBACK]
        elif target.host.address is not None:
            addresses = [str(target.host.address)]
        else:
            addresses = await self._judged(target)
        try:
            return await _connect(factory, addresses, target.port)
        except OSError as error:
            raise failed("connect-failed", f"{target.authority} cannot be connected to: {_why(error)}") from None

    async def _judged(self, target: Target) -> list[str]:
        """Resolve a name and keep the addresses that may be dialled.

        Raises:
            RefusedError: when the name has no address, or none that is not refused.
        """
        try:
            async with self._lookups:
                answers = await self._resolver.resolve(target.host.text, target.port)
        except (OSError, UnicodeError) as error:
            raise failed("dns-failed", f"{target.host.text} cannot be resolved: {_why(error)}") from None
        kept: list[Address] = []
        denial: Verdict | None = None
        for text in answers:
            address = parse_address(text)
            verdict = None if address is None else self._gate.admit(target, address)
            denial = denial or verdict
            if address is not None and verdict is None and address not in kept:
                kept.append(address)
        if kept:
            return [str(address) for address in _interleave(kept)]
        if denial is not None:
            raise RefusedError(denial)
        raise failed("dns-failed", f"{target.host.text} has no address")

    async def _through(self, proxy: UpstreamProxy, target: Target, factory: Callable[[], P]) -> P:
        """Open a tunnel through the upstream proxy, which is trusted and may be anywhere."""
        try:
            addresses = list(await self._resolver.resolve(proxy.host, proxy.port))
            handshake, _ = await _connect(_ProxyHandshake, addresses, proxy.port)
        except OSError as error:
            why = f"the upstream proxy {proxy.name} cannot be reached: {_why(error)}"
            raise failed("upstream-proxy-failed", why) from None
        try:
            rest = await handshake.open(target.authority, proxy.authorization)
        except (HttpError, OSError) as error:
            handshake.transport.abort()
            raise failed("upstream-proxy-failed", f"the upstream proxy {proxy.name}: {error}") from None
        except BaseException:
            handshake.transport.abort()
            raise
        protocol = factory()
        handshake.transport.set_protocol(protocol)
        protocol.connection_made(handshake.transport)
        if rest:
            protocol.data_received(rest)
        return protocol


class _ProxyHandshake(asyncio.Protocol):
    """CONNECT towards an upstream proxy, until its answer is complete."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._data = bytearray()
        self._done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def open(self, authority: str, authorization: str) -> bytes:
        """Ask for a tunnel; return bytes of the server that came with the answer."""
        head = f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n"
        if authorization:
            head += f"Proxy-Authorization: {authorization}\r\n"
        self.transport.write(f"{head}\r\n".encode("latin-1"))
        return await self._done

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment] # create_connection makes a Transport

    @override
    def data_received(self, data: bytes) -> None:
        self._data += data
        try:
            answer = parse_proxy_reply(self._data)
            if answer is not None and answer[0] not in _OK:
                raise HttpError("upstream-proxy-failed", f"it answers {answer[0]}")  # noqa: TRY301 - one handler for both
        except HttpError as error:
            if not self._done.done():
                self._done.set_exception(error)
            return
        if answer is not None and not self._done.done():
            self._done.set_result(bytes(self._data[answer[1] :]))

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(exc or ConnectionResetError("it closed the connection"))
            self._done.exception()


async def _connect(factory: Callable[[], P], addresses: Sequence[str], port: int) -> tuple[P, Line]:
    """Connect to the first address that answers, starting the next one after a failure or a pause.

    Raises:
        OSError: of the last address that failed.
    """
    loop = asyncio.get_running_loop()
    if len(addresses) == 1:
        _, protocol = await loop.create_connection(factory, addresses[0], port)
        return protocol, Line(addresses[0])
    waiting, attempts = list(addresses), dict[asyncio.Task[tuple[asyncio.Transport, P]], str]()
    error: OSError = OSError("no address")
    try:
        while waiting or attempts:
            if waiting:
                address = waiting.pop(0)
                attempts[loop.create_task(loop.create_connection(factory, address, port))] = address
            pause = STAGGER_S if waiting else None
            done, _ = await asyncio.wait(attempts, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                failure = task.exception()
                if failure is None:
                    return task.result()[1], Line(attempts.pop(task))
                del attempts[task]
                if not isinstance(failure, OSError):
                    raise failure
                error = failure
        raise error
    finally:
        for task in attempts:
            task.cancel()
            task.add_done_callback(_discard)


def _discard(task: asyncio.Task[tuple[asyncio.Transport, P]]) -> None:
    """Close the connection of an attempt that came second."""
    if not task.cancelled() and task.exception() is None:
        task.result()[0].abort()


def _interleave(addresses: list[Address]) -> list[Address]:
    """Alternate the families, the resolver's first choice first (RFC 8305, section 4)."""
    first = [address for address in addresses if address.version == addresses[0].version]
    other = [address for address in addresses if address.version != addresses[0].version]
    return [address for address in chain(*zip_longest(first, other)) if address is not None]


def _why(error: Exception) -> str:
    """Return the system's words without numbers and tuples."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
