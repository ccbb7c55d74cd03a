"""An OAuth provider on 127.0.0.1 that keeps its rules: what logins are tested against.

It speaks the real protocol and is strict where real ones are: PKCE S256 is verified, a code works once and only
with its redirect address, refresh tokens rotate, and one that comes a second time ends its whole family
(RFC 9700 section 4.14.2). Device codes as RFC 8628, revocation as RFC 7009. `trouble` makes it answer badly.
Every request is recorded with its body. For tests only.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import json
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlencode, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from cloister.policy.login import Login

CLIENT = "client-of-the-tests"
EMAIL = "person@example.org"


@dataclass
class Family:
    """All tokens that came from one agreement of the person."""

    access: set[str] = field(default_factory=set)
    refresh: str = ""
    ended: bool = False


@dataclass
class Answer:
    """What is answered instead of what the rules say."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    cut: bool = False
    """Whether the connection ends in the middle of the body."""
    drip: bool = False
    """Whether one byte comes at a time, slowly."""


class FakeOauth:
    """The provider. Use as a context manager."""

    def __init__(self, *, lifetime_s: float | None = 3600, rotate: bool = True, interval_s: float = 1) -> None:
        """Listen on a free port.

        Args:
            lifetime_s: `expires_in` of access tokens; None leaves it out.
            rotate: whether every renewal gives a new refresh token.
            interval_s: how often a device may ask.
        """
        self.lifetime_s = lifetime_s
        self.rotate = rotate
        self.interval_s = interval_s
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.families: list[Family] = []
        self.codes: dict[str, dict[str, str]] = {}
        self.devices: dict[str, dict[str, Any]] = {}
        self.trouble: list[Answer | None] = []
        """Taken one by one by requests to the token endpoint; None lets the rules answer."""
        self.after_rules: list[Answer] = []
        """Taken likewise, after the rules had their effect: the answer is lost on its way."""
        self.on_token: Callable[[], None] | None = None
        self.extra: dict[str, Any] = {}
        self.tls_port = 0
        self._lock = threading.Lock()
        self._more = ExitStack()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                owner._post(self)

            def do_GET(self) -> None:
                owner._get(self)

            def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002  # the base's name
                del format, arguments

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def also_over_tls(self, certificate: Path) -> None:
        """Serve the same over TLS, at `tls_port`."""
        self.tls_port = self._more.enter_context(over_tls(self._server.RequestHandlerClass, certificate))

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._more.close()
        self._server.shutdown()
        self._server.server_close()

    def login(self, **changes: Any) -> Login:
        """Return the `[login]` table of this provider."""
        table: dict[str, Any] = {
            "authorize_url": f"{self.url}/authorize",
            "token_url": f"{self.url}/token",
            "device_url": f"{self.url}/device",
            "revoke_url": f"{self.url}/revoke",
            "client_id": CLIENT,
            "scopes": ("read", "write"),
            "hosts": ("api.example.org",),
        }
        return Login(**(table | changes))

    def grant(self) -> dict[str, Any]:
        """Return a token answer of a new agreement, as if a person had logged in."""
        with self._lock:
            family = Family()
            self.families.append(family)
            return self._tokens(family)

    def agree(self, address: str) -> str:
        """Do what a person does in a browser at an authorize address; return the address that is redirected to."""
        asked = {name: values[0] for name, values in parse_qs(urlsplit(address).query).items()}
        assert asked["client_id"] == CLIENT
        assert asked["response_type"] == "code"
        assert asked["code_challenge_method"] == "S256"
        code = secrets.token_urlsafe(16)
        self.codes[code] = asked
        return f"{asked['redirect_uri']}?{urlencode({'code': code, 'state': asked['state']})}"

    def agree_device(self, user_code: str, outcome: str = "agreed") -> None:
        """Do what a person does at the device page."""
        for device in self.devices.values():
            if device["user_code"] == user_code:
                device["outcome"] = outcome

    def is_good(self, access_token: str) -> bool:
        """Say whether an access token opens the API."""
        return any(access_token in family.access and not family.ended for family in self.families)

    def renewals(self) -> int:
        """Return how often a refresh token was sent."""
        return sum(1 for path, fields in self.requests if fields.get("grant_type") == "refresh_token")

    def _tokens(self, family: Family) -> dict[str, Any]:
        access = f"at-{secrets.token_urlsafe(24)}"
        if self.rotate or not family.refresh:
            family.refresh = f"rt-{secrets.token_urlsafe(24)}"
        family.access.add(access)
        found: dict[str, Any] = {
            "access_token": access,
            "refresh_token": family.refresh,
            "token_type": "Bearer",
            "scope": "read write",
            "account": {"email_address": EMAIL},
        }
        if self.lifetime_s is not None:
            found["expires_in"] = self.lifetime_s
        return found | self.extra

    def _post(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length", "0")))
        if handler.headers.get("Content-Type") == "application/json":
            fields = {name: str(value) for name, value in json.loads(body).items()}
        else:
            fields = {name: values[0] for name, values in parse_qs(body.decode(), keep_blank_values=True).items()}
        path = urlsplit(handler.path).path
        self.requests.append((path, fields))
        if path == "/token" and self.on_token:
            self.on_token()
        trouble = self.trouble.pop(0) if path == "/token" and self.trouble else None
        if trouble is not None:
            _send(handler, trouble)
            return
        with self._lock:
            status, found = self._rules(path, fields)
        answer = Answer(status, json.dumps(found).encode())
        if path == "/token" and self.after_rules:
            answer = self.after_rules.pop(0)
        _send(handler, answer)

    def _get(self, handler: BaseHTTPRequestHandler) -> None:
        """Serve an API that wants a token."""
        token = handler.headers.get("Authorization", "").removeprefix("Bearer ")
        self.requests.append((handler.path, {"authorization": token}))
        _send(handler, Answer(200, b'{"ok": true}') if self.is_good(token) else Answer(401, b"{}"))

    def _rules(self, path: str, fields: dict[str, str]) -> tuple[int, dict[str, Any]]:
        if path == "/device":
            return self._device()
        if path == "/revoke":
            for family in self.families:
                if fields["token"] in {family.refresh, *family.access}:
                    family.ended = True
            return 200, {}
        if fields.get("client_id") != CLIENT:
            return 401, {"error": "invalid_client"}
        match fields.get("grant_type"):
            case "authorization_code":
                return self._exchange(fields)
            case "refresh_token":
                return self._refresh(fields)
            case "urn:ietf:params:oauth:grant-type:device_code":
                return self._poll(fields)
        return 400, {"error": "unsupported_grant_type"}

    def _exchange(self, fields: dict[str, str]) -> tuple[int, dict[str, Any]]:
        asked = self.codes.pop(fields.get("code", ""), None)
        if asked is None or asked["redirect_uri"] != fields.get("redirect_uri"):
            return 400, {"error": "invalid_grant"}
        digest = hashlib.sha256(fields.get("code_verifier", "").encode()).digest()
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != asked["code_challenge"]:
            return 400, {"error": "invalid_grant", "error_description": fields.get("code_verifier", "")}
        family = Family()
        self.families.append(family)
        return 200, self._tokens(family)

    def _refresh(self, fields: dict[str, str]) -> tuple[int, dict[str, Any]]:
        sent = fields.get("refresh_token", "")
        family = next((family for family in self.families if family.refresh == sent and not family.ended), None)
        if family is None:
            for other in self.families:  # a token that was rotated away: whoever has it may have stolen it
                other.ended = other.ended or self.rotate
            return 400, {"error": "invalid_grant", "error_description": f"unknown token {sent}"}
        return 200, self._tokens(family)

    def _device(self) -> tuple[int, dict[str, Any]]:
        code = secrets.token_urlsafe(16)
        self.devices[code] = {"user_code": f"WDJB-{len(self.devices):04}", "outcome": "", "asked": 0.0}
        return 200, {
            "device_code": code,
            "user_code": self.devices[code]["user_code"],
            "verification_uri": f"{self.url}/activate",
            "expires_in": 60,
            "interval": self.interval_s,
        }

    def _poll(self, fields: dict[str, str]) -> tuple[int, dict[str, Any]]:
        device = self.devices.get(fields.get("device_code", ""))
        if device is None:
            return 400, {"error": "expired_token"}
        early = time.monotonic() - device["asked"] < self.interval_s * 0.9
        device["asked"] = time.monotonic()
        if early:
            return 400, {"error": "slow_down"}
        if device["outcome"] == "denied":
            return 400, {"error": "access_denied"}
        if device["outcome"] != "agreed":
            return 400, {"error": "authorization_pending"}
        family = Family()
        self.families.append(family)
        return 200, self._tokens(family)


@contextmanager
def over_tls(handler: Callable[..., Any], certificate: Path, **attributes: object) -> Iterator[int]:
    """Serve a handler over TLS on loopback, with what it looks for at its server; yield the port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    vars(server).update(attributes)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def make_certificate(folder: Path, *names: str) -> tuple[Path, Path]:
    """Make an authority and a certificate for some names; return the files of both, the second with its key."""
    key, leaf_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority of a test")])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
    begin = dt.datetime.now(dt.UTC) - dt.timedelta(days=1)

    def sign(subject: x509.Name, public: ec.EllipticCurvePublicKey, *extensions: x509.ExtensionType) -> bytes:
        builder = x509.CertificateBuilder().issuer_name(own).subject_name(subject).public_key(public)
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(begin).not_valid_after(begin + dt.timedelta(days=2))
        identifiers = (
            x509.SubjectKeyIdentifier.from_public_key(public),
            x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()),
        )
        for extension in (*extensions, *identifiers):
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)

    authority, server = folder / "authority.pem", folder / "server.pem"
    authority.write_bytes(sign(own, key.public_key(), x509.BasicConstraints(ca=True, path_length=None)))
    alternative = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
    private = leaf_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    server.write_bytes(sign(subject, leaf_key.public_key(), alternative) + private)
    return authority, server


def _send(handler: BaseHTTPRequestHandler, answer: Answer) -> None:
    time.sleep(answer.delay_s)
    try:
        handler.send_response(answer.status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(answer.body)))
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        if answer.drip:
            for index in range(len(answer.body)):
                handler.wfile.write(answer.body[index : index + 1])
                time.sleep(0.05)
            return
        handler.wfile.write(answer.body[: len(answer.body) // 2] if answer.cut else answer.body)
        handler.wfile.flush()
    except OSError:
        return
    finally:
        handler.close_connection = True
