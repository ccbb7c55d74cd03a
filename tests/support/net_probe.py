"""Tries connections and says what came of each: `net_probe.py tcp:ADDRESS:PORT udp:ADDRESS:PORT …` prints JSON.

Standard library only: it runs inside of machines, as whoever a test starts it. Outcomes are `open` (connected, or
answered), the name of an error, or `silence`; the second value is how long it took, in seconds.

    net_probe.py --held ADDRESS PORT    keeps one connection, and says for each line read whether it still carries
    net_probe.py --given FD ADDRESS PORT  connects with a socket that somebody else made
    net_probe.py --handed PATH TCP…     makes a socket, hands it to who listens at the Unix socket PATH
"""

import errno
import json
import socket
import sys
import time

WAIT_S = 1.5
SMC = 43  # AF_SMC
SOCKETS = {
    "tcp": lambda family: (family, socket.SOCK_STREAM),
    "udp": lambda family: (family, socket.SOCK_DGRAM),
    "mptcp": lambda family: (family, socket.SOCK_STREAM, socket.IPPROTO_MPTCP),
    "udplite": lambda family: (family, socket.SOCK_DGRAM, socket.IPPROTO_UDPLITE),
    "sctp": lambda family: (family, socket.SOCK_STREAM, socket.IPPROTO_SCTP),
    "smc": lambda family: (SMC, socket.SOCK_STREAM, int(family == socket.AF_INET6)),
}


def say(text: str) -> None:
    """Print a line: this program's output is its interface."""
    print(text, flush=True)  # noqa: T201


def outcome(error: OSError) -> str:
    """Return what a person would call it."""
    if isinstance(error, TimeoutError):
        return "silence"
    return errno.errorcode.get(error.errno or 0, str(error))


def attempt(text: str) -> tuple[str, float]:
    """Try one target."""
    kind, _, rest = text.partition(":")
    address, _, port = rest.rpartition(":")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    began = time.monotonic()
    try:
        sock = socket.socket(*SOCKETS[kind](family))
    except OSError as error:
        return outcome(error), 0.0
    with sock:
        sock.settimeout(WAIT_S)
        try:
            sock.connect((address, int(port)))
            sock.send(b"ping\n")
            said = "open" if sock.recv(16) else "closed"
        except OSError as error:
            said = outcome(error)
    return said, round(time.monotonic() - began, 3)


def hold(address: str, port: str) -> None:
    """Keep a connection; each line of standard input is one more try to use it."""
    with socket.create_connection((address, int(port)), WAIT_S) as sock:
        sock.settimeout(WAIT_S)
        say("held")
        for _ in sys.stdin:
            try:
                sock.send(b"ping\n")
                said = "open" if sock.recv(16) else "closed"
            except OSError as error:
                said = outcome(error)
            say(said)


def given(number: str, address: str, port: str) -> None:
    """Connect with a socket that came as a descriptor."""
    with socket.socket(fileno=int(number)) as sock:
        sock.settimeout(WAIT_S)
        try:
            sock.connect((address, int(port)))
            say("open")
        except OSError as error:
            say(outcome(error))


def hand(path: str) -> None:
    """Make a socket and pass it on."""
    with socket.socket(socket.AF_UNIX) as link, socket.socket() as sock:
        link.connect(path)
        socket.send_fds(link, [b"s"], [sock.fileno()])
        link.recv(1)


def main(words: list[str]) -> None:
    """Do what the first word says."""
    if words[0] == "--held":
        hold(*words[1:])
    elif words[0] == "--given":
        given(*words[1:])
    elif words[0] == "--handed":
        hand(*words[1:])
    else:
        say(json.dumps({word: attempt(word) for word in words}))


if __name__ == "__main__":
    main(sys.argv[1:])
