"""The identity service: the key store over HTTP, on 127.0.0.1:2082 and on a Unix socket.

For programs that do not link with Cloister: verifiers, and other services of the same user.
Runs do not need it (the broker has the same core in process), and cannot reach it: no sandbox
sees the socket, and the proxy leads to no loopback port that the policy does not name.

This file is the process and its sockets; what the routes mean is in `identity_api`. OpenID
Connect and SAML logins of people belong to the control plane and are not here.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import hmac
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable
from http import HTTPStatus
from ipaddress import ip_address

import msgspec

from cloister.egress.http1 import Body, Headers, HttpError, ResponseHead
from cloister.errors import CloisterError, DeniedError, UsageError
from cloister.host.key_store import read_private
from cloister.host.owner import identify
from cloister.identity.authority import Grant
from cloister.policy.first_use import look_at_types
from cloister.policy.units import parse_duration
from cloister.relay.connection import HttpConnection
from cloister.relay.exchange import Exchange
from cloister.relay.session import Limits
from cloister.runs import client
from cloister.runs.identity import grant_of
from cloister.runs.identity_files import DIRECTORY
from cloister.runs.identity_store import IdentityStore
from cloister.runs.paths import Paths, locate
from cloister.runs.policies import PolicyFiles
from cloister.runs.store import Store, is_id
from cloister.services.identity_api import MAX_BODY, Answer, Api

PORT = 2082
CONNECTIONS = 128
_LIMITS = Limits(head_bytes=16 * 1024, head_fields=64, pipelined=8, head_timeout_s=10, keepalive_timeout_s=60,
                 idle_timeout_s=30)  # fmt: skip
_MIN_ADMIN_TOKEN = 32
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Service:
    """The listening sockets and their connections."""

    def __init__(self, api: Api, admin_token: str = "") -> None:
        """Take the routes; without an admin token only the Unix socket has callers."""
        self._api = api
        self._admin = hashlib.sha256(admin_token.encode()).digest() if admin_token else b""
        self._connections: set[HttpConnection] = set()
        self._servers: list[asyncio.AbstractServer] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweeper: asyncio.TimerHandle | None = None

    async def listen(self, address: str, port: int, path: str) -> int:
        """Open both sockets; return the port.

        Raises:
            UsageError: the address is not a loopback one.
            OSError: one of them cannot be opened.
        """
        if not ip_address(address).is_loopback:
            raise UsageError("listen-invalid", "the identity service listens on loopback only", where=address)
        loop = asyncio.get_running_loop()
        tcp = await loop.create_server(lambda: self._connection(trusted=False), address, port)
        self._servers.append(tcp)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(path)
        os.chmod(path, 0o600)
        self._servers.append(await loop.create_unix_server(lambda: self._connection(trusted=True), sock=listener))
        self._sweep()
        return int(tcp.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop listening and end every connection."""
        for server in self._servers:
            server.close()
        if self._sweeper:
            self._sweeper.cancel()
        for connection in list(self._connections):
            connection.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*(server.wait_closed() for server in self._servers))

    def _connection(self, *, trusted: bool) -> HttpConnection:
        connection = HttpConnection(_LIMITS, lambda exchange: self._serve(exchange, trusted=trusted), _unreadable)
        self._connections.add(connection)
        connection.on_lost.append(lambda: self._connections.discard(connection))
        return connection

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        for connection in list(self._connections):
            connection.sweep(loop.time())
        self._sweeper = loop.call_later(2.0, self._sweep)

    def _serve(self, exchange: Exchange, *, trusted: bool) -> None:
        """Take one request; its answer is made off the event loop when its body is complete."""
        if len(self._connections) > CONNECTIONS:
            exchange.keep_alive = False
            _respond(exchange, Answer(503, _words("too-many-connections", "too many connections are open")))
            return
        if not trusted and not _names_loopback(exchange.headers):
            # A web page can point a name of its own at 127.0.0.1; it cannot choose the Host that the browser sends.
            _respond(exchange, Answer(421, _words("host-invalid", "this service answers by its loopback address only")))
            return
        if exchange.method == "POST" and not _is_json(exchange.headers):
            _respond(exchange, Answer(415, _words("content-type", "the body must be application/json")))
            return
        if any(name.lower() == b"expect" for name, _ in exchange.headers):
            exchange.interim(100, b"Continue", [])
        caller = (trusted and _is_own(exchange)) or self._is_admin(exchange.headers)
        exchange.attach(_Body(exchange, lambda body: self._start(exchange, body, caller=caller)))

    def _start(self, exchange: Exchange, body: bytes, *, caller: bool) -> None:
        task = asyncio.get_running_loop().create_task(self._answer(exchange, body, caller=caller))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, exchange: Exchange, body: bytes, *, caller: bool) -> None:
        path = exchange.url.decode("latin-1")
        loop = asyncio.get_running_loop()
        try:
            answer = await loop.run_in_executor(
                None, lambda: self._api.answer(exchange.method, path, body, caller=caller)
            )
        except Exception as error:  # noqa: BLE001  # a bug is told as one, and must not take the others down
            loop.call_exception_handler({"message": "a request to the identity service failed", "exception": error})
            answer = Answer(500, _words("bug", "a bug in the identity service"))
        _respond(exchange, answer)

    def _is_admin(self, headers: Headers) -> bool:
        shown = [value for name, value in headers if name.lower() == b"authorization"]
        if not self._admin or len(shown) != 1 or not shown[0].lower().startswith(b"bearer "):
            return False
        return hmac.compare_digest(hashlib.sha256(shown[0][7:].strip()).digest(), self._admin)


class _Body:
    """Collects a request's body, up to a bound."""

    def __init__(self, exchange: Exchange, done: Callable[[bytes], None]) -> None:
        self._exchange = exchange
        self._done: Callable[[bytes], None] | None = done
        self._parts = bytearray()

    def write_body(self, data: bytes) -> None:
        """Take a piece."""
        if self._done is None:
            return
        self._parts += data
        if len(self._parts) > MAX_BODY:
            self._done = None
            self._parts.clear()
            _respond(self._exchange, Answer(413, _words("body-too-large", "the body is larger than 64 KiB")))

    def end_body(self, trailers: Headers) -> None:
        """Take the end."""
        del trailers
        if self._done:
            self._done(bytes(self._parts))

    def abandon(self) -> None:
        """The client is gone."""
        self._done = None


def _respond(exchange: Exchange, answer: Answer) -> None:
    if exchange.connection.current is not exchange:
        return  # the client has gone
    switches = exchange.method == "CONNECT" or exchange.websocket
    exchange.keep_alive = exchange.keep_alive and exchange.ended and not switches
    response = _response(answer, close=not exchange.keep_alive, head_only=exchange.method == "HEAD")
    exchange.respond_whole(answer.status, response)


def _response(answer: Answer, *, close: bool, head_only: bool = False) -> bytes:
    body = msgspec.json.encode(answer.body)
    headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
    phrase = HTTPStatus(answer.status).phrase.encode()
    head = ResponseHead(answer.status, phrase, headers, Body("length", len(body)), close=close).encode()
    return head if head_only else head + body


def _unreadable(_connection: HttpConnection, error: HttpError) -> bytes:
    return _response(Answer(400, _words(error.reason, error.explanation)), close=True)


def _words(reference: str, message: str) -> dict[str, dict[str, str]]:
    return {"error": {"reference": reference, "message": message}}


def _names_loopback(headers: Headers) -> bool:
    hosts = [value.decode("latin-1").strip().lower() for name, value in headers if name.lower() == b"host"]
    if len(hosts) != 1:
        return False
    name, colon, port = hosts[0].rpartition(":")
    return (name if colon and port.isdigit() else hosts[0]) in _LOOPBACK_NAMES


def _is_json(headers: Headers) -> bool:
    kinds = [value.split(b";")[0].strip().lower() for name, value in headers if name.lower() == b"content-type"]
    return kinds == [b"application/json"]


def _is_own(exchange: Exchange) -> bool:
    """Say whether the process at the other end is this user's or root's, by the kernel's word (unix(7))."""
    transport = exchange.connection.transport
    if transport is None:
        return False
    copy = os.dup(transport.get_extra_info("socket").fileno())
    with socket.socket(fileno=copy) as peer:
        _, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return uid in (os.geteuid(), 0)


class Runs:
    """The grants of living runs: what their plans gave them, narrowed to the policy as it is now."""

    def __init__(self, paths: Paths, uid: int) -> None:
        """Know where records and policies are."""
        self._store = Store(paths.runs)
        self._policies = PolicyFiles(paths, uid)
        self._lock = threading.Lock()

    def grant(self, run: str) -> Grant | None:
        """Return what a living run may have, or None.

        Raises:
            PolicyError: the policy as it is now cannot be read.
        """
        if not is_id(run) or run not in _living():
            return None
        with self._lock:
            return self._look(run)

    def _look(self, run: str) -> Grant | None:
        plan, record = self._store.plan(run), self._store.record(run)
        if plan is None or record is None:
            return None
        grant = grant_of(plan, record.started)
        now = self._policies.resolve(plan.agent, plan.profile, workspace=plan.project).agent.identity
        if grant is None or not now.audiences:
            return None
        return grant.narrowed(now.audiences, int(parse_duration(now.lifetime)), self._policies.digest)


def _living() -> frozenset[str]:
    """Return the ids of living runs by the broker's word; none when there is no broker."""
    answer = client.ask_running({"verb": "living"})
    if answer is None or answer[0]:
        return frozenset()
    return frozenset(msgspec.json.decode(answer[1])["runs"])


def read_admin_token(path: str) -> str:
    """Return the admin token kept in a file.

    Raises:
        DeniedError: others can read it, it is missing, or it could be guessed.
    """
    text = (read_private(path) or b"").decode("ascii", "replace").strip()
    if len(text) < _MIN_ADMIN_TOKEN or not text.isprintable():
        raise DeniedError("admin-token-weak", f"the admin token needs {_MIN_ADMIN_TOKEN} characters or more",
                          where=path, remedy=f"(umask 077; openssl rand -hex 32 > {path})")  # fmt: skip
    return text


def main(argv: list[str] | None = None) -> int:
    """Serve until told to stop.

    Raises:
        CloisterError: the sockets or the admin token cannot be had.
    """
    parser = argparse.ArgumentParser(prog="cloister-identity", description="Serve tokens and public keys.")
    parser.add_argument("--listen", default="127.0.0.1", help="loopback address to listen on")
    parser.add_argument("--port", type=int, default=PORT, help=f"port to listen on ({PORT}); 0 takes a free one")
    parser.add_argument("--admin-token", default="", metavar="FILE", help="file with the token of TCP callers")
    options = parser.parse_args(argv)
    os.umask(0o077)
    owner = identify(os.environ.get("HOME", ""))
    paths = locate(os.environ, owner.home, owner.uid)
    store = IdentityStore(f"{paths.state}/{DIRECTORY}", os.environ, hostname=socket.gethostname())
    service = Service(
        Api(store, Runs(paths, owner.uid).grant),
        read_admin_token(options.admin_token) if options.admin_token else "",
    )
    os.makedirs(paths.runtime, mode=0o700, exist_ok=True)
    look_at_types()
    import uvloop

    try:
        uvloop.run(_serve(service, options.listen, options.port, f"{paths.runtime}/identity.sock"))
    except (OSError, ValueError) as error:
        raise CloisterError("listen-failed", f"the identity service cannot listen: {error}") from error
    return 0


async def _serve(service: Service, address: str, port: int, path: str) -> None:
    loop = asyncio.get_running_loop()
    stopped = loop.create_future()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.cancel)
    shown = await service.listen(address, port, path)
    os.write(1, f"identity: http://{address}:{shown} and {path}\n".encode())
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await stopped
    finally:
        await service.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


if __name__ == "__main__":
    import sys

    sys.exit(main())
