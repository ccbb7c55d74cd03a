"""AWS requests signed anew: the client signed with a placeholder pair, the broker signs with the real one.

Region, service and date are those of the client's own signature, so every AWS tool works as it
is. Source: IAM user guide, "Create a signed AWS API request" (Signature Version 4), and for S3
"Authenticating Requests: Using the Authorization Header". Only that header is understood:
presigned addresses, `AWS4-ECDSA` and bodies whose chunks are signed one by one cannot be
signed again without holding the whole body, and are refused.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from urllib.parse import quote, unquote_to_bytes

from cloister.credentials.bindings import Headers, InjectionError, Request

ALGORITHM = "AWS4-HMAC-SHA256"
MAX_BODY_BYTES = 16 << 20
"""How much of a body is taken in where its hash is part of the signature and the client did not send it."""

_AUTHORIZATION = re.compile(
    rb"AWS4-HMAC-SHA256 +Credential=([^/,\s]{1,128})/(\d{8})/([a-z0-9-]{1,64})/([A-Za-z0-9_-]{1,64})/aws4_request, *"
    rb"SignedHeaders=([a-z0-9;_.-]{1,4096}), *Signature=[0-9a-f]{64}"
)
_DATE = re.compile(rb"\d{8}T\d{6}Z")
_HEX_HASH = re.compile(r"[0-9a-f]{64}")
_UNSIGNED = ("UNSIGNED-PAYLOAD", "STREAMING-UNSIGNED-PAYLOAD-TRAILER")
_PLAIN_PATH_SERVICES = frozenset({"s3", "s3express", "s3-object-lambda", "s3-outposts"})
"""Services that sign the path as it is sent; all others sign it with its escapes escaped once more."""
_UNSTABLE = frozenset(
    {"connection", "content-length", "expect", "te", "transfer-encoding", "accept-encoding", "user-agent"}
)
"""Fields that the relay may write anew, so they do not belong into a signature; none of them has to be in it."""
_TOKEN_FIELD = "x-amz-security-token"  # noqa: S105  # the name of a field
_HASH_FIELD = "x-amz-content-sha256"
_JSON_KEYS = {"AccessKeyId": "key_id", "SecretAccessKey": "secret_key", "SessionToken": "session_token"}
_FILE_KEYS = {
    "aws_access_key_id": "key_id",
    "aws_secret_access_key": "secret_key",
    "aws_session_token": "session_token",
}


@dataclass(frozen=True, slots=True)
class Keys:
    """A real key pair."""

    key_id: str = field(repr=False)
    secret_key: str = field(repr=False)
    session_token: str = field(default="", repr=False)


class Scope(NamedTuple):
    """What the client's own signature says."""

    key_id: str
    date: str
    region: str
    service: str
    signed: tuple[str, ...]

    @property
    def text(self) -> str:
        """The credential scope."""
        return f"{self.date}/{self.region}/{self.service}/aws4_request"


def parse_keys(secret: bytes) -> Keys:
    """Return the pair in a secret: `ID:KEY[:TOKEN]`, an AWS credentials file, or the JSON of `credential_process`.

    Raises:
        InjectionError: it is none of these.
    """
    text = secret.decode("utf-8", "replace").strip()
    found: dict[str, Any] = {}
    if text.startswith("{"):
        try:
            written = json.loads(text)
        except ValueError:
            written = {}
        found = {name: written.get(key, "") for key, name in _JSON_KEYS.items()} if isinstance(written, dict) else {}
    elif "=" in text and "\n" in text:
        found = _from_file(text)
    else:
        found = dict(zip(("key_id", "secret_key", "session_token"), text.split(":", 2), strict=False))
    parts = {name: value for name, value in found.items() if isinstance(value, str) and value}
    visible = all(value.isascii() and value.isprintable() and " " not in value for value in parts.values())
    if not ({"key_id", "secret_key"} <= parts.keys() and visible):
        raise InjectionError(
            "secret-unusable",
            "the secret for sigv4 is no AWS key pair",
            "store KEY_ID:SECRET_KEY, or use command:aws configure export-credentials",
        )
    return Keys(**parts)


def signatures(request: Request) -> list[bytes]:
    """Return the client's signatures, in the header or the query, whatever their kind."""
    found = [value for name, value in request.headers if name.lower() == b"authorization"]
    _, mark, text = request.path.partition("?")
    return [*found, text.encode()] if mark and "x-amz-" in text.lower() and "signature=" in text.lower() else found


def body_needed(headers: Headers) -> int:
    """Return how many bytes of body the signature needs: none where the client says its hash in a field."""
    return 0 if _value_of(headers, _HASH_FIELD) else MAX_BODY_BYTES


def sign(request: Request, keys: Keys) -> Request:
    """Return the request with a signature by the real pair in place of the client's.

    Raises:
        InjectionError: the client's signature is of a kind that cannot be made anew.
    """
    scope, moment = _read(request)
    headers = [(name, value) for name, value in request.headers if name.lower() != b"authorization"]
    headers = [(name, value) for name, value in headers if name.lower() != _TOKEN_FIELD.encode()]
    if keys.session_token:
        headers.append((_TOKEN_FIELD.encode(), keys.session_token.encode()))
    present = {name.lower().decode("latin-1") for name, _ in headers} | {"host"}
    wanted = {*scope.signed, "host"} | {name for name in present if name.startswith("x-amz-")}
    signed = sorted(wanted & present - _UNSTABLE)
    canonical = canonical_request(replace(request, headers=headers), signed, scope.service)
    signature = _signature(canonical, scope, moment, keys.secret_key)
    value = (
        f"{ALGORITHM} Credential={keys.key_id}/{scope.text}, SignedHeaders={';'.join(signed)}, Signature={signature}"
    )
    return replace(request, headers=[*headers, (b"authorization", value.encode())])


def canonical_request(request: Request, signed: list[str], service: str) -> str:
    """Return the canonical request of Signature Version 4."""
    bare, _, text = request.path.partition("?")
    lines = [request.method, _canonical_path(bare, service), _canonical_query(text)]
    for name in signed:
        values = [value for key, value in request.headers if key.lower().decode("latin-1") == name]
        if name == "host":
            values = [request.host.encode()]
        lines.append(f"{name}:{','.join(' '.join(value.decode('latin-1').split()) for value in values)}")
    lines += ["", ";".join(signed), _payload_hash(request)]
    return "\n".join(lines)


def _read(request: Request) -> tuple[Scope, str]:
    """Return the client's scope and time."""
    found = [value for name, value in request.headers if name.lower() == b"authorization"]
    match = _AUTHORIZATION.fullmatch(found[0].strip()) if len(found) == 1 else None
    if match is None:
        raise InjectionError(
            "signature-unsupported",
            "only requests signed in one Authorization field with AWS4-HMAC-SHA256 can be signed anew",
            "let the tool send the request itself, instead of a presigned address",
        )
    parts = [part.decode("ascii") for part in match.groups()]
    moment = _value_of(request.headers, "x-amz-date")
    if not _DATE.fullmatch(moment.encode("latin-1")) or moment[:8] != parts[1]:
        raise InjectionError("signature-unsupported", "the signature's date is not that of the field x-amz-date")
    payload = _value_of(request.headers, _HASH_FIELD)
    if payload and payload not in _UNSIGNED and not _HEX_HASH.fullmatch(payload):
        raise InjectionError(
            "signature-unsupported",
            "each chunk of this body is signed by itself, which cannot be done again on the way",
            "configure the tool to send unsigned or whole payloads: payload_signing_enabled = false",
        )
    return Scope(parts[0], parts[1], parts[2], parts[3], tuple(parts[4].split(";"))), moment


def _signature(canonical: str, scope: Scope, moment: str, secret_key: str) -> str:
    text = "\n".join((ALGORITHM, moment, scope.text, hashlib.sha256(canonical.encode()).hexdigest()))
    key = f"AWS4{secret_key}".encode()
    for part in (scope.date, scope.region, scope.service, "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return hmac.digest(key, text.encode(), "sha256").hex()


def _payload_hash(request: Request) -> str:
    return _value_of(request.headers, _HASH_FIELD) or hashlib.sha256(request.body).hexdigest()


def _canonical_path(path: str, service: str) -> str:
    if service in _PLAIN_PATH_SERVICES:
        return path or "/"
    kept: list[str] = []
    for part in path.split("/"):
        if part == "..":
            kept = kept[:-1]
        elif part not in {"", "."}:
            kept.append(part)
    last = "/" if path.endswith("/") and kept else ""
    return quote(f"/{'/'.join(kept)}{last}", safe="/~")


def _canonical_query(text: str) -> str:
    pairs = [part.partition("=")[::2] for part in text.split("&") if part]
    return "&".join(f"{key}={value}" for key, value in sorted((_encoded(key), _encoded(value)) for key, value in pairs))


def _encoded(text: str) -> str:
    return quote(unquote_to_bytes(text), "-_.~")


def _value_of(headers: Headers, name: str) -> str:
    return next((value.decode("latin-1").strip() for key, value in headers if key.lower() == name.encode()), "")


def _from_file(text: str) -> dict[str, str]:
    """Read an AWS credentials file: the section `default`, or the only one."""
    sections: dict[str, dict[str, str]] = {}
    section = ""
    for line in text.splitlines():
        if line.strip().startswith("["):
            section = line.strip(" []\t")
            continue
        name, equals, value = line.partition("=")
        if equals and name.strip().lower() in _FILE_KEYS:
            sections.setdefault(section, {})[_FILE_KEYS[name.strip().lower()]] = value.strip()
    only = next(iter(sections.values()), {}) if len(sections) == 1 else {}
    return sections.get("default", only)
