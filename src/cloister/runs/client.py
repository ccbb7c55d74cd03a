"""Talking to the broker: connect, start it when needed, send a request.

On the hot path of `cloister run`, so it imports nothing that is not in the interpreter already
(measured: `socket` costs 6 ms, `json` 6 ms, `_socket` 0.2 ms). Frames are those of
ARCHITECTURE.md, "Shim protocol". The answer to `run` is read by the shim, which takes this
process over; control verbs read theirs with `ask`.
"""

from __future__ import annotations

import _socket
import os
import sys
import time

from cloister.errors import CloisterError, RetryError, UsageError

SHIM = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "host", "shim", "cloister-shim")
_SO_PEERCRED = 17  # asm-generic/socket.h; _socket has it, but not on every build
START_TIMEOUT_S = 20.0
MAX_FRAME = 4 << 20
HEADER = 5
_DELIVERIES = 100
_DELIVERY_PAUSE_S = 0.02
"""Bytes of a frame before its payload: length and type."""


def pack(items: list[bytes]) -> bytes:
    """Encode a list: count, then each length and item, all u32 little endian."""
    parts = [len(items).to_bytes(4, "little")]
    for item in items:
        parts += [len(item).to_bytes(4, "little"), item]
    return b"".join(parts)


def frame(kind: bytes, payload: bytes) -> bytes:
    """Encode one frame.

    Raises:
        CloisterError: the payload is larger than a frame may be.
    """
    if len(payload) > MAX_FRAME:
        raise CloisterError("request-too-large", "the arguments or the environment are larger than 4 MiB")
    return len(payload).to_bytes(4, "little") + kind + payload


def runtime_directory() -> str:
    """Return the directory of the broker's socket: the same rule as `runs/paths.py`, without its imports."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if not base.startswith("/"):
        base = f"/run/user/{os.getuid()}"
        try:
            usable = os.lstat(base).st_uid == os.getuid()
        except OSError:
            usable = False
        if not usable:
            state = os.environ.get("XDG_STATE_HOME", "")
            base = (state if state.startswith("/") else home() + "/.local/state") + "/cloister"
    return base.rstrip("/") + "/cloister"


def home() -> str:
    """Return the caller's home: HOME when it is absolute, else the password database's word."""
    value = os.environ.get("HOME", "")
    if value.startswith("/"):
        return value.rstrip("/") or "/"
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        raise CloisterError(
            "home-unknown", "there is no home directory for this user", remedy="export HOME=..."
        ) from None


def connect() -> _socket.socket:
    """Return a connection to the caller's broker, starting the broker when none answers.

    Raises:
        RetryError: it could not be started, or somebody else's process answers.
    """
    path = runtime_directory() + "/broker.sock"
    connection = _try(path)
    if connection is None:
        _start(path)
        connection = _try(path)
    if connection is None:
        raise RetryError("broker-unreachable", "the broker started but does not answer", where=path, remedy="try again")
    return connection


def _try(path: str) -> _socket.socket | None:
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        return None
    credentials = connection.getsockopt(_socket.SOL_SOCKET, _SO_PEERCRED, 12)
    if int.from_bytes(credentials[4:8], sys.byteorder) != os.getuid():
        connection.close()
        raise RetryError("broker-foreign", "another user's process listens on the broker's socket", where=path)
    return connection


def _start(path: str) -> None:
    """Start the broker detached, and wait for its word that it listens."""
    started = time.monotonic()
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    null = os.open(os.devnull, os.O_RDWR)
    actions = [(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, null, 1), (os.POSIX_SPAWN_CLOSE, read_end)]
    argv = [sys.executable, "-I", "-m", "cloister.services.broker", "--ready-fd", str(write_end)]
    # In a session of its own from the first moment: Ctrl-C is for the run, and not for what all runs share.
    os.posix_spawn(sys.executable, argv, _broker_environment(), file_actions=actions, setsid=True)
    os.close(write_end)
    os.close(null)
    import select

    noted = False
    while True:
        left = START_TIMEOUT_S - (time.monotonic() - started)
        ready, _, _ = select.select([read_end], [], [], min(1.0, max(left, 0)))
        if ready:
            break
        if left <= 0:
            raise RetryError("broker-slow", f"the broker did not start within {START_TIMEOUT_S:g} s", where=path)
        if not noted:
            sys.stderr.write("cloister: starting the broker\n")
            noted = True
    answer = os.read(read_end, 1)
    os.close(read_end)
    if answer != b"1":
        raise RetryError("broker-failed", "the broker could not start; its own message is above", where=path)


def _broker_environment() -> dict[str, str]:
    """Pass on what says whose directories are meant and how to get out; the caller's secrets stay out of it.

    But for the master key of the identity store, where it is kept in the environment: the broker takes it out there.
    """
    directories = ("XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME")
    names = ("HOME", "PATH", "LANG", *directories)
    proxies = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
    own = ("CLOISTER_BROKER_IDLE_S", "DBUS_SESSION_BUS_ADDRESS", "CLOISTER_TRUST_DOMAIN")
    keys = ("CLOISTER_MASTER_KEY", "CLOISTER_MASTER_KEY_PATH")
    trust = ("SSL_CERT_FILE", "SSL_CERT_DIR", "CREDENTIALS_DIRECTORY")  # whom it believes, what its unit gave it
    environment = {name: os.environ[name] for name in (*names, *proxies, *own, *keys, *trust) if name in os.environ}
    return {**environment, "HOME": home()}


def request(
    fields: dict[str, str], argv: list[str], descriptors: tuple[int, ...], connection: _socket.socket | None = None
) -> _socket.socket:
    """Send a request with its argv and the caller's environment; return the connection for the answer.

    A raw request is answered at once; what it tells is left to be read.

    Raises:
        RetryError: no broker takes it.
    """
    head = [f"{name}={value}".encode("utf-8", "surrogateescape") for name, value in fields.items()]
    words = [os.fsencode(word) for word in argv]
    variables = [name + b"=" + value for name, value in os.environb.items()]
    first = frame(b"L", pack(head))
    rest = frame(b"V", pack(words)) + frame(b"N", pack(variables))
    packed = b"".join(descriptor.to_bytes(4, sys.byteorder) for descriptor in descriptors)
    ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, packed)] if descriptors else []
    for _ in range(_DELIVERIES):
        link = connection or connect()
        try:
            sent = link.sendmsg([first], ancillary)
            link.sendall(first[sent:] + rest)
            if "raw" in fields:
                link.recv(1, _socket.MSG_PEEK)
        except (BrokenPipeError, ConnectionResetError):
            # A broker that is being killed still accepts, and reads nothing (unix(7): a reset tells that bytes were
            # left unread). A moment later it is gone, and another one is started.
            link.close()
            if connection is not None:
                break
            time.sleep(_DELIVERY_PAUSE_S)
        else:
            return link
    raise RetryError("broker-gone", "the broker went away without an answer", remedy="try again")


def request_raw(verb: str, words: list[str]) -> _socket.socket:
    """Send the words of `run` or `exec` as they are: the same request as `host/shim/client.c` sends.

    Raises:
        UsageError: the current directory is gone.
    """
    try:
        directory = os.getcwd()
    except OSError as error:
        raise UsageError(
            "directory-unusable", f"cannot start there: {error.strerror}", where=".", remedy="cd to a project"
        ) from None
    terminal = "1" if os.isatty(0) and os.isatty(1) else ""
    return request({"verb": verb, "cwd": directory, "raw": "1", "terminal": terminal}, words, (0, 1, 2))


def become_shim(connection: _socket.socket) -> None:
    """Replace this process by the shim's outer half, which goes on with the conversation.

    Raises:
        CloisterError: the shim is not installed.
    """
    descriptor = connection.detach()
    os.set_inheritable(descriptor, True)
    try:
        os.execv(SHIM, [SHIM, "outer", str(descriptor)])  # noqa: S606  # a list, and no shell is meant
    except OSError as error:
        raise CloisterError(
            "shim-missing", f"the helper program cannot be run: {error.strerror}", where=SHIM,
            remedy="reinstall cloister where a C compiler is present: apt-get install gcc libc6-dev",
        ) from None  # fmt: skip


def ask(fields: dict[str, str]) -> tuple[int, bytes]:
    """Send a control request; return the exit code and the answer (JSON, or a text when the code is not 0)."""
    return _answer(request(fields, [], ()))


def ask_running(fields: dict[str, str]) -> tuple[int, bytes] | None:
    """Send a control request to a broker that runs already; return None when there is none."""
    connection = _try(runtime_directory() + "/broker.sock")
    return None if connection is None else _answer(request(fields, [], (), connection))


def _answer(connection: _socket.socket) -> tuple[int, bytes]:
    data = b""
    try:
        while chunk := connection.recv(65536):
            data += chunk
            if len(data) >= HEADER and len(data) >= HEADER + int.from_bytes(data[:4], "little"):
                break
    except ConnectionResetError:
        data = b""  # it died with the request unread
    connection.close()
    if len(data) <= HEADER:
        raise RetryError("broker-gone", "the broker went away without an answer", remedy="try again")
    payload = data[HEADER : HEADER + int.from_bytes(data[:4], "little")]
    return (payload[0], payload[1:]) if data[4:5] == b"F" else (0, payload)
