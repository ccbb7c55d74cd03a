"""The identity service over its real sockets: who may ask for what, bad input, load. Tokens are judged by an oracle."""

import asyncio
import http.client
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import uvloop
from hypothesis import given, settings

from cloister.errors import CloisterError
from cloister.identity.authority import Grant
from cloister.runs.identity_store import IdentityStore
from cloister.services.identity import Service, read_admin_token
from cloister.services.identity_api import MAX_BODY, Api
from support import jws

pytestmark = pytest.mark.kernel

ADMIN = "made-up-admin-token-of-forty-characters!"
RUN, ENDED = "0123456789ab", "0000000000zz"
JSON = {"Content-Type": "application/json"}


class Reply(NamedTuple):
    """A response."""

    status: int
    body: Any
    headers: dict[str, str]


class Served:
    """A service in a thread of its own, with one living run."""

    def __init__(self, folder: Path, socket_path: str) -> None:
        """Start it."""
        self.store = IdentityStore(str(folder / "identity"), {}, hostname="host")
        self.path = socket_path
        self.port = 0
        self._grant = Grant(
            agent="coder", run=RUN, user="alice", policy="ab" * 32, audiences=("vault",), lifetime_s=300,
            since=time.time() - 10,
        )  # fmt: skip
        ready = threading.Event()
        self.errors: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=lambda: uvloop.run(self._main(ready)))
        self._thread.start()
        assert ready.wait(20)

    async def _main(self, ready: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(lambda _, context: self.errors.append(context))
        self._stop = self._loop.create_future()
        service = Service(Api(self.store, {RUN: self._grant}.get), ADMIN)
        self.port = await service.listen("127.0.0.1", 0, self.path)
        ready.set()
        await self._stop
        await service.close()

    def close(self) -> None:
        """Stop it."""
        self._loop.call_soon_threadsafe(self._stop.set_result, None)
        self._thread.join(20)

    def ask(
        self, method: str, path: str, body: Any = None, *, unix: bool = False, headers: dict[str, str] | None = None
    ) -> Reply:
        """Send one request; a body that is no text is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        if unix:
            connection.sock = self.connect(unix=True)
        data = body if isinstance(body, bytes) else (None if body is None else json.dumps(body).encode())
        connection.request(method, path, data, {**(JSON if method == "POST" else {}), **(headers or {})})
        response = connection.getresponse()
        text = response.read()
        connection.close()
        assert response.headers["content-type"] == "application/json"
        return Reply(response.status, json.loads(text) if text else None, dict(response.headers.items()))

    def connect(self, *, unix: bool = False) -> socket.socket:
        """Open a bare connection."""
        made = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
        made.settimeout(20)
        made.connect(self.path if unix else ("127.0.0.1", self.port))
        return made

    def token(self, audience: str = "vault") -> str:
        """Return a token of the living run."""
        return self.ask("POST", "/v1/tokens", {"run": RUN, "audience": audience}, unix=True).body["token"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service that all tests of this file share."""
    folder = tmp_path_factory.mktemp("service")
    served = Served(folder, str(folder / "s"))
    yield served
    served.close()
    assert not served.errors


def test_health_and_public_keys_are_for_everybody(served: Served) -> None:
    """Both routes answer on both sockets; the set verifies a token without code of ours."""
    token = served.token()
    for unix in (False, True):
        assert served.ask("GET", "/healthz", unix=unix).body["status"] == "ok"
        jwks = served.ask("GET", "/.well-known/jwks.json", unix=unix).body
        claims = jws.read_by_jwks(token, jwks)
        assert claims is not None
        assert (claims["agent"], claims["run"], claims["policy"]) == ("coder", RUN, "ab" * 32)
    assert "d" not in json.dumps([sorted(key) for key in jwks["keys"]]).replace("kid", ""), "no private part"


def test_verifying_is_for_everybody(served: Served) -> None:
    """A good token gives its claims; a wrong audience, digest or a broken token a reason, and never the token."""
    token = served.token()
    good = served.ask("POST", "/v1/verify", {"token": token, "audience": "vault", "run": RUN})
    assert (good.status, good.body["valid"], good.body["claims"]["sub"][:9]) == (200, True, "spiffe://")
    for changes, reason in (({"audience": "x"}, "token-audience"), ({"require_digest": "cd" * 32}, "token-policy"),
                            ({"agent": "other"}, "token-agent"), ({"token": token[:-2] + "AA"}, "token-signature"),
                            ({"token": "rubbish"}, "token-malformed")):  # fmt: skip
        reply = served.ask("POST", "/v1/verify", {"token": token, "audience": "vault", **changes})
        assert (reply.status, reply.body["valid"], reply.body["reason"]) == (200, False, reason)
        assert token.split(".")[2] not in json.dumps(reply.body)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/tokens", {"run": RUN, "audience": "vault"}),
        ("/v1/revoke", {"kind": "agent", "id": "nobody"}),
        ("/v1/keys/rotate", {"agent": "coder"}),
    ],
)
def test_only_callers_issue_revoke_and_rotate(served: Served, path: str, body: dict[str, str]) -> None:
    """Over TCP without the admin token: refused, however it is spelt. With it, and on the Unix socket: served."""
    served.token()
    for shown in ({}, {"Authorization": "Bearer "}, {"Authorization": f"Bearer {ADMIN}x"}, {"Authorization": ADMIN},
                  {"Authorization": f"Basic {ADMIN}"}, {"X-Admin": ADMIN}, {"Authorization": f"Bearer {ADMIN[:-1]}"},
                  {"Authorization": f"Bearer {served.token()}"}):  # fmt: skip
        reply = served.ask("POST", path, body, headers=shown)
        assert (reply.status, reply.body["error"]["reference"]) == (403, "caller-unknown")
    assert served.ask("POST", path, body, headers={"Authorization": f"Bearer {ADMIN}"}).status in {200, 201}
    assert served.ask("POST", path, body, unix=True).status in {200, 201}


@pytest.mark.root
def test_the_unix_socket_asks_the_kernel_who_calls(tmp_path: Path) -> None:
    """Another user who gets at the socket (somebody made it writable) is no caller; root and the owner are."""
    with tempfile.TemporaryDirectory(prefix="ci-", dir="/tmp") as short:
        os.chmod(short, 0o755)  # noqa: S103  # on purpose: the kernel's word must be enough
        other = Served(tmp_path, f"{short}/s")
        os.chmod(other.path, 0o666)  # noqa: S103  # same
        mine = other.ask("POST", "/v1/keys/rotate", {}, unix=True).status
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.setresgid(4242, 4242, 4242)
                os.setresuid(4242, 4242, 4242)
                asked = other.ask("POST", "/v1/keys/rotate", {}, unix=True).status
                health = other.ask("GET", "/healthz", unix=True).status
                status = 0 if (asked, health) == (403, 200) else 2
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        other.close()

    assert mine == 400, "the owner is heard: there is nothing to rotate yet"
    assert os.waitstatus_to_exitcode(status) == 0


def test_the_caller_does_not_choose_what_a_token_says(served: Served) -> None:
    """Another agent, an ended run, an audience or a life that the policy does not give, claims of one's own."""
    good = {"run": RUN, "audience": "vault"}
    for changes in ({"agent": "other"}, {"run": ENDED}, {"run": "../../x"}, {"run": ""}, {"audience": "sts"},
                    {"audience": ""}, {"lifetime_s": 301}, {"lifetime_s": 900}, {"lifetime_s": -1}):  # fmt: skip
        reply = served.ask("POST", "/v1/tokens", good | changes, unix=True)
        assert (reply.status, "token" in reply.body) == (403, False), changes
    for changes in ({"policy": "00"}, {"claims": {}}, {"user": "root"}, {"lifetime_s": "9"}, {"run": None}):
        assert served.ask("POST", "/v1/tokens", good | changes, unix=True).status == 400, changes
    short = served.ask("POST", "/v1/tokens", good | {"lifetime_s": 60, "agent": "coder"}, unix=True).body
    claims = json.loads(jws.unb64(short["token"].split(".")[1]))
    assert claims["exp"] - claims["iat"] == 60 == short["expires_in"]


def test_a_revoked_key_is_gone_from_the_next_answer_on(served: Served) -> None:
    """Over HTTP as well as for other processes; a rotation leaves tokens alone."""
    token = served.token()
    ask = {"token": token, "audience": "vault"}
    assert served.ask("POST", "/v1/keys/rotate", {}, unix=True).body == {"rotated": ["coder"]}
    assert served.ask("POST", "/v1/verify", ask).body["valid"]
    kid = json.loads(jws.unb64(token.split(".")[0]))["kid"]
    assert served.ask("POST", "/v1/revoke", {"kind": "key", "id": kid}, unix=True).status == 200

    assert served.ask("POST", "/v1/verify", ask).body["reason"] == "token-key"
    assert kid not in json.dumps(served.ask("GET", "/.well-known/jwks.json").body)
    assert served.ask("POST", "/v1/verify", {"token": served.token(), "audience": "vault"}).body["valid"]
    assert served.ask("POST", "/v1/revoke", {"kind": "key", "id": "no-such-key"}, unix=True).status == 400


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:2082", "127.0.0.1.evil.example", "10.0.0.1", "", "[::2]"]
)
def test_a_web_page_that_points_its_name_here_is_refused(served: Served, host: str) -> None:
    """DNS rebinding: the browser sends the page's own name as Host. Loopback names are served."""
    assert served.ask("GET", "/healthz", headers={"Host": host}).status == 421
    for good in ("localhost", "127.0.0.1:2082", "[::1]:2082", "LOCALHOST:1"):
        assert served.ask("GET", "/healthz", headers={"Host": good}).status == 200


def test_a_form_of_a_web_page_is_refused(served: Served) -> None:
    """Types that browsers send without asking first are not JSON."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        headers = {"Content-Type": kind, "Authorization": f"Bearer {ADMIN}"}
        assert served.ask("POST", "/v1/revoke", {"kind": "run", "id": "x"}, headers=headers).status == 415


def test_routes_and_methods(served: Served) -> None:
    """What is not there is 404, another method 405, both as JSON; HEAD has no body."""
    for path in (
        "/",
        "/v1",
        "/v1/tokens/",
        "/v1/../healthz",
        "//healthz",
        "/healthz?x",
        "/.well-known/jwks.json/",
        "/%00",
    ):
        assert served.ask("GET", path).status == 404
    for method, path in (("POST", "/healthz"), ("GET", "/v1/tokens"), ("PUT", "/v1/verify"), ("DELETE", "/v1/revoke")):
        assert served.ask(method, path, unix=True).status == 405
    assert served.ask("HEAD", "/healthz")[:2] == (405, None)


def test_bodies_are_bounded(served: Served) -> None:
    """64 KiB is read, more is refused before it came, also when the length is not told beforehand."""
    padded = json.dumps({"token": "x" * (MAX_BODY - 60), "audience": "a"}).encode()
    assert len(padded) < MAX_BODY
    assert served.ask("POST", "/v1/verify", padded).body["reason"] == "token-malformed"
    assert served.ask("POST", "/v1/verify", b" " * (MAX_BODY + 1)).status == 413
    with served.connect() as raw:
        raw.sendall(b"POST /v1/verify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    b"Transfer-Encoding: chunked\r\n\r\n")  # fmt: skip
        try:
            for _ in range(64):
                raw.sendall(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
        except OSError:
            pass
        assert raw.recv(100).startswith(b"HTTP/1.1 413")
    assert served.ask("GET", "/healthz").status == 200


@given(st.binary(max_size=300))
@settings(max_examples=80)
def test_any_bytes_on_the_wire(served: Served, data: bytes) -> None:
    """Whatever is sent, the service answers with an error or closes, and serves the next one."""
    with served.connect() as raw:
        raw.sendall(data + b"\r\n\r\n")
        raw.shutdown(socket.SHUT_WR)
        answer = b""
        while part := raw.recv(4096):
            answer += part
    assert not answer or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 2"))
    assert served.ask("GET", "/healthz").status == 200


BODIES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=30) | st.sampled_from(["run", "agent", "key", RUN]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["token", "audience", "run", "agent", "kind", "id", "lifetime_s", "x"]), inner
        )
    ),
    max_leaves=10,
)


@given(st.sampled_from(["/v1/verify", "/v1/tokens", "/v1/keys/rotate"]), BODIES | st.binary(max_size=200))
@settings(max_examples=150)
def test_any_body_on_every_route(served: Served, path: str, body: Any) -> None:
    """Bodies of any shape end in an answer below 500, and never in a token that was not granted."""
    reply = served.ask("POST", path, body, unix=True)

    assert reply.status < 500
    if "token" in (reply.body or {}):
        assert body["run"] == RUN
        assert body.get("audience", "cloister") in {"cloister", "vault"}


def test_many_at_once_and_one_that_hangs(served: Served) -> None:
    """A caller that sends half a request holds up nobody; a thousand questions are all answered right."""
    token = served.token()
    hanging = [served.connect() for _ in range(10)]
    for one in hanging:
        one.sendall(b"POST /v1/verify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    b"Content-Length: 100\r\n\r\n{")  # fmt: skip

    def client(number: int) -> list[bool]:
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
        found = []
        for turn in range(50):
            shown = token if (number + turn) % 2 else f"{token[:-4]}AAAA"
            connection.request("POST", "/v1/verify", json.dumps({"token": shown, "audience": "vault"}), JSON)
            found.append(json.loads(connection.getresponse().read())["valid"] == (shown == token))
        connection.close()
        return found

    with ThreadPoolExecutor(20) as pool:
        results = [one for found in pool.map(client, range(20)) for one in found]
    for one in hanging:
        one.close()
    assert results == [True] * 1000


def test_the_store_being_sealed_elsewhere_is_told_and_not_repaired(served: Served, tmp_path: Path) -> None:
    """A service whose master key is wrong says so with 503, and makes no fresh keys."""
    store = IdentityStore(str(tmp_path / "identity"), {"CLOISTER_MASTER_KEY": "0a" * 32})
    store.derive("x")
    api = Api(IdentityStore(str(tmp_path / "identity"), {"CLOISTER_MASTER_KEY": "0b" * 32}), lambda _: None)
    before = (tmp_path / "identity/store.json").read_bytes()

    for method, path in (("GET", "/healthz"), ("GET", "/.well-known/jwks.json"), ("POST", "/v1/keys/rotate")):
        answer = api.answer(method, path, b"{}", caller=True)
        assert (answer.status, answer.body["error"]["reference"]) == (503, "master-key-wrong")
        assert "0b0b" not in json.dumps(answer.body)
    assert (tmp_path / "identity/store.json").read_bytes() == before


def test_an_admin_token_must_be_secret_and_long(tmp_path: Path) -> None:
    """Readable by others, short, or missing: the service does not start with it."""
    file = tmp_path / "admin"
    for text, mode in (("short", 0o600), (ADMIN, 0o644), ("", 0o600)):
        file.write_text(text)
        file.chmod(mode)
        with pytest.raises(CloisterError) as caught:
            read_admin_token(str(file))
        assert not text or text not in str(vars(caught.value))
    file.write_text(f"{ADMIN}\n")
    file.chmod(0o600)
    assert read_admin_token(str(file)) == ADMIN


def test_only_loopback_is_listened_on(tmp_path: Path) -> None:
    """Another address is refused; the Unix socket is ours alone."""

    async def listen(address: str) -> int:
        service = Service(Api(IdentityStore(str(tmp_path), {}), lambda _: None))
        port = await service.listen(address, 0, str(tmp_path / "s"))
        await service.close()
        return port

    for address in ("0.0.0.0", "::", "192.0.2.1"):  # noqa: S104  # refused
        with pytest.raises(CloisterError, match="loopback"):
            asyncio.run(listen(address))
    assert asyncio.run(listen("127.0.0.1"))
    assert os.stat(tmp_path / "s").st_mode & 0o777 == 0o600
