"""Leave HTTP/1.1 by an upgrade, by HTTP/2 or by TLS to the proxy."""

import socket

from cloister.prove.inside.support import PROXY, Box

ID = "proxy-upgrade"
TITLE = "Leave HTTP/1.1 by an upgrade, by HTTP/2 or by TLS to the proxy"
PROMISE = "P-053"
CLASSES = (54, 55)
EXPECT = "nothing is relayed that the proxy does not read"
SHAPE = "any"


def attack(box: Box) -> None:
    """h2c by upgrade and by prior knowledge, a TLS hello, HTTP/0.9, and a request that never ends."""
    here = f"127.0.0.1:{int(box.fact('tcp_port'))}"
    upgrade = (
        f"GET http://{here}/ HTTP/1.1\r\nHost: {here}\r\nConnection: Upgrade, HTTP2-Settings\r\n"
        "Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"
    )
    box.proxy_refuses("h2c upgrade", upgrade.encode())
    for name, data in (
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        ("TLS", bytes.fromhex("16030100050100000100")),
        ("HTTP/0.9", f"GET http://{here}/\r\n".encode()),
        ("garbage", b"\0" * 64),
        ("HTTP/3.0", f"GET http://{here}/ HTTP/3.0\r\n\r\n".encode()),
    ):
        answer = talk(data)
        status = answer[9:12].decode("latin-1") if answer.startswith(b"HTTP/1.") else ("bytes" if answer else "closed")
        box.must(not status.startswith(("1", "2", "3")), f"{name}: {status}")


def talk(data: bytes) -> bytes:
    """Send, and return the first answer; silence is nothing."""
    with socket.create_connection(PROXY, timeout=0.6) as connection:
        try:
            connection.sendall(data)
            return connection.recv(4096)
        except OSError:
            return b""
