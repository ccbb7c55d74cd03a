"""A local network, a cloud's metadata and a bit of the internet, inside a machine: all of it one process's addresses.

Run as a program inside (`lan.py serve`), it has a network namespace of its own and answers on every address that is
on its loopback: TCP with what it was sent, UDP too. `join` connects a machine with it, and gives the host an address
in the LAN and a public one. Standard library only.
"""

from __future__ import annotations

import selectors
import socket
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from support.machines import Machine

PUBLIC = ("93.184.216.34", "2606:2800:220:1::34")
LAN4 = ("10.66.0.2", "172.20.0.2", "192.168.66.2", "192.168.77.9")
LAN6 = ("fd66::2", "fd7a:115c:a1e0::2")
TAILNET = ("100.66.0.2", "100.100.100.100")
METADATA = (
    "169.254.169.254", "169.254.170.2", "100.100.100.200", "168.63.129.16", "192.0.0.192",
    "fd00:ec2::254", "fd20:ce::254", "fd00:c1::a9fe:a9fe", "fd00:42::42",
)  # fmt: skip
EMBEDDING = ("64:ff9b::a42:2", "2002:a42:2::1", "2001:0:a42:2::1", "2606:2800:220:1:0:5efe:a42:2")
"""NAT64, 6to4, Teredo and ISATAP addresses with 10.66.0.2 in them."""
OTHER = ("198.18.0.9", "203.0.113.2", "2001:db8::9")
HOST4, HOST6, HOST_PUBLIC = "192.168.66.1", "fd66::1", "93.184.200.1"
PORTS = (22, 25, 80)
FAR = "test-far.service"
PROGRAM = "/srv/tests/support/lan.py"


def join(machine: Machine) -> None:
    """Make the network, once for each boot of the machine."""
    there = sorted({*PUBLIC, *LAN4, *LAN6, *TAILNET, *METADATA, *EMBEDDING, *OTHER})
    serving = ["/usr/bin/python3", PROGRAM, "serve", str(len(there))]
    machine.run(["systemd-run", "--quiet", "--unit", FAR, "-p", "Type=exec", "-p", "PrivateNetwork=yes", *serving])
    far = f"nsenter --target $(systemctl show --value -p MainPID {FAR}) --net"
    lines = [
        "ip link add lan0 type veth peer name far0",
        f"ip link set far0 netns $(systemctl show --value -p MainPID {FAR})",
        f"ip address add {HOST4}/24 dev lan0",
        f"ip address add {HOST6}/64 dev lan0 nodad",
        f"ip address add {HOST_PUBLIC}/32 dev lan0",
        "ip link set lan0 up",
        f"{far} ip link set lo up",
        f"{far} ip link set far0 up",
        *(f"{far} ip address add {each}/{24 if each in LAN4[2:3] else 32} dev "
          f"{'far0' if each in LAN4[2:3] else 'lo'}" for each in there if ":" not in each),
        *(f"{far} ip address add {each}/{64 if each == LAN6[0] else 128} dev "
          f"{'far0' if each == LAN6[0] else 'lo'} nodad" for each in there if ":" in each),
        f"ip route add default via {LAN4[2]}",
        f"ip -6 route add default via {LAN6[0]}",
        f"{far} ip route add {HOST_PUBLIC}/32 via {HOST4}",
    ]  # fmt: skip
    machine.run(["sh", "-ec", "\n".join(lines)])
    machine.wait_for(f"systemctl is-active --quiet {FAR} && grep -q 1 /run/test-far")


def serve(wanted: int) -> None:
    """Answer on every address, when all of them are there."""
    chosen = selectors.DefaultSelector()
    while len(addresses := _addresses()) < wanted:
        time.sleep(0.01)
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        for port in PORTS:
            listener = socket.create_server((address, port), family=family)
            chosen.register(listener, selectors.EVENT_READ, "listener")
        echo = socket.socket(family, socket.SOCK_DGRAM)
        echo.bind((address, 53))
        chosen.register(echo, selectors.EVENT_READ, "datagrams")
    with open("/run/test-far", "w", encoding="ascii") as ready:
        ready.write("1")
    while True:
        for key, _ in chosen.select():
            sock: socket.socket = key.fileobj  # type: ignore[assignment]
            try:
                _answer(chosen, sock, key.data)
            except OSError:
                chosen.unregister(sock)
                sock.close()


def _answer(chosen: selectors.BaseSelector, sock: socket.socket, kind: str) -> None:
    if kind == "listener":
        chosen.register(sock.accept()[0], selectors.EVENT_READ, "stream")
    elif kind == "datagrams":
        data, sender = sock.recvfrom(1500)
        sock.sendto(data, sender)
    else:
        data = sock.recv(1500)
        if not data:
            raise OSError
        sock.sendall(data)


def _addresses() -> list[str]:
    """Return this network namespace's addresses, without its loopback's own and link-local ones."""
    with open("/proc/net/if_inet6", encoding="ascii") as file:
        found = [socket.inet_ntop(socket.AF_INET6, bytes.fromhex(line.split()[0])) for line in file]
    with open("/proc/net/fib_trie", encoding="ascii") as file:
        last = ""
        for line in file:
            words = line.split()
            if words[:1] == ["|--"]:
                last = words[1]
            elif words[:3] == ["/32", "host", "LOCAL"]:
                found.append(last)
    return sorted({each for each in found if each not in {"::1", "127.0.0.1"} and not each.startswith("fe80")})


if __name__ == "__main__":
    serve(int(sys.argv[2]))
