"""The agent sockets of a run as a data plane: split and piled-up messages, sizes, many clients, strange agents."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Self

import pytest

from cloister.credentials.gpg_agent import GpgAgentFilter, GpgGrant
from cloister.credentials.signing import SigningEvent
from cloister.credentials.ssh_agent import Grant, Ring, SshAgentFilter
from cloister.credentials.ssh_keys import fingerprint
from cloister.credentials.ssh_known_hosts import HostKeys, Place
from cloister.credentials.ssh_wire import string
from cloister.relay import agent_sockets, gpg_agent, ssh_agent
from support.ssh_material import bind, document, listed, login, make_ed25519, sign_request

pytestmark = pytest.mark.kernel
HOST, KEY = make_ed25519(1), make_ed25519(10)
NOW = 1_750_000_000.0
PLACE = Place("git.example.org")
RING = Ring(
    "claude",
    (Grant("forge", fingerprint(KEY.blob), frozenset({PLACE}), git=True),),
    {PLACE: HostKeys(frozenset({HOST.blob}))},
)
SIGNED = b"\x0e" + string(b"signature")
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def a_good_agent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer as ssh-agent does."""
    while True:
        try:
            message = await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))
        except asyncio.IncompleteReadError:
            writer.close()
            return
        writer.write(string({11: listed(KEY), 13: SIGNED}.get(message[0], b"\x06")))


class Rig:
    """A run's socket in front of an agent that a test wrote."""

    def __init__(self, folder: Path, agent: Handler | None, uid: int | None = None) -> None:
        """Serve below `folder`; without an agent nobody listens there."""
        self.folder, self.agent = folder, agent
        self.uid = os.getuid() if uid is None else uid
        self.events: list[SigningEvent] = []

    async def __aenter__(self) -> Self:
        path = str(self.folder / "upstream.sock")
        self.upstream = await asyncio.start_unix_server(self.agent, path) if self.agent else None
        clients = ssh_agent.SshAgentClients(
            path, self.uid, lambda: SshAgentFilter(RING, lambda: NOW), self.events.append
        )
        self.server = agent_sockets.AgentServer(clients.serve, ssh_agent.LIMIT)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.folder / "run.sock"))
        listener.listen(64)
        listener.setblocking(False)
        await self.server.start(listener)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.close()
        if self.upstream:
            self.upstream.close()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Be a client."""
        return await asyncio.open_unix_connection(str(self.folder / "run.sock"))

    async def say(self, *messages: bytes) -> list[bytes]:
        """Send messages in one piece; return the answers."""
        reader, writer = await self.connect()
        writer.write(b"".join(map(string, messages)))
        answers = [await _message(reader) for _ in messages]
        writer.close()
        return answers

    @property
    def reasons(self) -> list[str]:
        """What was recorded."""
        return [event.reason for event in self.events]


async def _message(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))


def test_messages_are_served_in_order_however_they_come(tmp_path: Path, run) -> None:
    """Many requests in one write, and one request byte by byte: every one gets its own answer."""

    async def main() -> None:
        async with Rig(tmp_path, a_good_agent) as rig:
            wanted = [
                bind(HOST),
                b"\x0b",
                sign_request(KEY, login(KEY)),
                b"\x11",
                sign_request(KEY, document()),
                b"\x0b",
            ]
            answers = await rig.say(*wanted)
            assert [answer[0] for answer in answers] == [6, 12, 14, 5, 14, 12]
            reader, writer = await rig.connect()
            for byte in string(sign_request(KEY, document())):
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0)
            assert await _message(reader) == SIGNED
            writer.close()
            assert rig.reasons == ["signed", "request-refused", "signed", "signed"]

    run(main())


def test_a_binding_is_its_connections_own(tmp_path: Path, run) -> None:
    """What one connection was bound to is nothing to another one."""

    async def main() -> None:
        async with Rig(tmp_path, a_good_agent) as rig:
            held = await rig.connect()
            held[1].write(string(bind(HOST)))
            assert await _message(held[0]) == b"\x06"
            assert await rig.say(sign_request(KEY, login(KEY))) == [b"\x05"]
            assert rig.reasons == ["bind-missing"]
            held[1].close()

    run(main())


@pytest.mark.parametrize("length", [0, 256 * 1024 + 1, 2**32 - 1])
def test_no_message_is_longer_than_any_may_be(tmp_path: Path, run, length: int) -> None:
    """The connection ends at the length, before a byte of it is read or kept; the next client is served."""

    async def main() -> None:
        async with Rig(tmp_path, a_good_agent) as rig:
            reader, writer = await rig.connect()
            writer.write(length.to_bytes(4, "big") + bytes(1000))
            assert await reader.read() == b""
            writer.close()
            assert rig.reasons == ["request-too-long"]
            assert (await rig.say(b"\x0b"))[0][0] == 12

    run(main())


def test_there_is_an_end_to_clients(tmp_path: Path, run) -> None:
    """Clients beyond the limit are turned away; when one leaves, the next is served."""

    async def main() -> None:
        async with Rig(tmp_path, a_good_agent) as rig:
            held = []
            for _ in range(agent_sockets.MAX_CLIENTS):
                held.append(await rig.connect())
                held[-1][1].write(string(b"\x0b"))
                assert (await _message(held[-1][0]))[0] == 12
            late, writer = await rig.connect()
            assert await late.read() == b""
            writer.close()
            held.pop()[1].close()
            await asyncio.sleep(0.1)
            assert (await rig.say(b"\x0b"))[0][0] == 12
            for _, other in held:
                other.close()

    run(main())


async def _hangs_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(4)
    writer.close()


async def _says_too_much(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"\xff\xff\xff\xff" + bytes(1000))


async def _is_silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(20)
    writer.close()


@pytest.mark.parametrize("agent", [None, _hangs_up, _says_too_much, _is_silent])
def test_a_strange_agent_is_a_clear_no(tmp_path: Path, run, agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not there, gone in between, too loud, silent: the client gets failure in time, and the record says why."""
    monkeypatch.setattr(ssh_agent, "ANSWER_S", 0.3)

    async def main() -> None:
        async with Rig(tmp_path, agent) as rig:
            assert await rig.say(sign_request(KEY, document()), b"\x0b") == [b"\x05", b"\x05"]
            assert set(rig.reasons) == {"agent-unreachable"}

    run(main())


def test_another_users_agent_is_not_asked(tmp_path: Path, run) -> None:
    """The kernel says whose socket it is (SO_PEERCRED): somebody who put one in the place gets no request."""
    if os.getuid() == 0:
        pytest.skip("root's agents are everybody's")

    async def main() -> None:
        async with Rig(tmp_path, a_good_agent, uid=os.getuid() + 1) as rig:
            assert await rig.say(sign_request(KEY, document())) == [b"\x05"]
            assert rig.reasons == ["agent-unreachable"]

    run(main())


def test_the_end_of_a_run_ends_what_is_open(tmp_path: Path, run) -> None:
    """A client in the middle of a question is cut off, and nobody can connect any more."""

    async def main() -> None:
        async with Rig(tmp_path, _is_silent) as rig:
            reader, writer = await rig.connect()
            writer.write(string(b"\x0b"))
            await asyncio.sleep(0.1)
            await rig.server.close()
            assert await reader.read() == b""
            writer.close()
            with pytest.raises(OSError, match=r"refused|No such file"):
                await rig.connect()

    run(main())


def test_gpg_lines_are_served_in_order_and_questions_declined(tmp_path: Path, run) -> None:
    """Lines in one write get an answer each; the agent's own questions are not the client's; long lines end it."""
    grip, digest = "A" * 40, "ab" * 32
    events: list[SigningEvent] = []
    heard: list[bytes] = []

    async def agent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"OK Pleased to meet you\n")
        while line := await reader.readline():
            heard.append(line)
            if line == b"PKSIGN\n":
                writer.write(b"INQUIRE PINENTRY_LAUNCHED 1\n")
                heard.append(await reader.readline())
                writer.write(b"D signature\nOK\n")
            else:
                writer.write(b"OK\n")
        writer.close()

    async def main() -> None:
        upstream = await asyncio.start_unix_server(agent, str(tmp_path / "gpg.sock"))
        clients = gpg_agent.GpgAgentClients(
            str(tmp_path / "gpg.sock"), os.getuid(),
            lambda: GpgAgentFilter("claude", [GpgGrant("sign", "F" * 40, frozenset({grip}))]), events.append,
        )  # fmt: skip
        server = agent_sockets.AgentServer(clients.serve, gpg_agent.LIMIT)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "run.sock"))
        listener.listen(8)
        listener.setblocking(False)
        await server.start(listener)
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "run.sock"))
        writer.write(f"SIGKEY {grip}\nSETHASH 8 {digest}\r\nPKSIGN\nKILLAGENT\nBYE\n".encode())
        lines = (await reader.read()).splitlines()
        writer.close()
        long, writer = await asyncio.open_unix_connection(str(tmp_path / "run.sock"))
        writer.write(b"X" * 5000)
        assert (await long.read()).splitlines() == [b"OK Pleased to meet you"]
        writer.close()
        await server.close()
        upstream.close()
        assert [line[:3] for line in lines] == [b"OK ", b"OK", b"OK", b"D s", b"OK", b"ERR", b"OK "]
        assert heard == [f"SIGKEY {grip}\n".encode(), f"SETHASH 8 {digest}\n".encode(), b"PKSIGN\n", b"CAN\n"]
        assert [event.reason for event in events] == ["signed", "request-refused", "request-too-long"]

    run(main())
