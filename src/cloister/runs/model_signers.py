"""Upstreams that a key alone does not open: requests signed for AWS, access tokens of Google. Libraries come late."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from cloister.errors import CloisterError, UnsupportedError
from cloister.llm.upstreams import Upstream
from cloister.relay.llm.supply import Key, Signer

_SCOPES = ("https://www.googleapis.com/auth/cloud-platform",)
_SERVICES = {"bedrock-runtime": "bedrock"}
"""Names by which AWS signs, where the first label of the host is another."""


def signer_for(upstream: Upstream, key: Key | None) -> Signer | None:
    """Return who signs for an upstream, or None where its key is enough.

    Raises:
        UnsupportedError: the library for it is not installed, or there is no key to sign with.
    """
    if upstream.auth not in {"sigv4", "google"}:
        return None
    if key is None:
        message = f'auth = "{upstream.auth}" needs a key to sign with'
        raise UnsupportedError("key-missing", message, where=f".providers.{upstream.name}.key")
    return AwsSigner(upstream, key) if upstream.auth == "sigv4" else GoogleSigner(upstream, key)


class AwsSigner:
    """Signature Version 4, by botocore. The key is `KEY_ID:SECRET_KEY[:SESSION_TOKEN]`."""

    def __init__(self, upstream: Upstream, key: Key) -> None:
        """Import the library.

        Raises:
            UnsupportedError: it is not installed.
        """
        try:
            from botocore.auth import SigV4Auth  # type: ignore[import-untyped]
            from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped]
            from botocore.credentials import Credentials  # type: ignore[import-untyped]
        except ImportError:
            raise _missing("botocore", "aws", upstream) from None
        label = upstream.host.partition(".")[0]
        self._key, self._region, self._service = key, upstream.region, _SERVICES.get(label, label)
        self._auth, self._request, self._credentials = SigV4Auth, AWSRequest, Credentials

    async def sign(self, method: str, url: str, headers: Mapping[str, str], body: bytes) -> list[tuple[str, str]]:
        """Return the fields of a signature.

        Raises:
            ValueError: the key is no pair, or cannot be had.
        """
        parts = (await _read(self._key)).split(":", 2)
        if len(parts) < 2:  # noqa: PLR2004 - id and secret
            raise ValueError("the key for sigv4 is KEY_ID:SECRET_KEY[:SESSION_TOKEN]")
        request = self._request(method=method, url=url, data=body, headers=dict(headers))
        self._auth(self._credentials(*parts), self._service, self._region).add_auth(request)
        names = ("Authorization", "X-Amz-Date", "X-Amz-Security-Token", "X-Amz-Content-SHA256")
        return [(name, str(request.headers[name])) for name in names if name in request.headers]


class GoogleSigner:
    """Access tokens for Vertex, by google-auth. The key is the JSON of a service account."""

    def __init__(self, upstream: Upstream, key: Key) -> None:
        """Import the library.

        Raises:
            UnsupportedError: it is not installed.
        """
        try:
            from google.auth.transport.requests import Request
            from google.oauth2 import service_account
        except ImportError:
            raise _missing("google-auth", "google", upstream) from None
        self._key, self._transport = key, Request
        self._account: Any = service_account.Credentials
        self._loaded = ""
        self._credentials: Any = None
        self._lock = asyncio.Lock()

    async def sign(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes  # noqa: ARG002 - a token is for any request
    ) -> list[tuple[str, str]]:  # fmt: skip
        """Return the field with an access token, renewed outside the event loop when it is due.

        Raises:
            ValueError: the key is no service account, or Google gives no token.
        """
        async with self._lock:
            text = await _read(self._key)
            if text != self._loaded:
                try:
                    self._credentials = self._account.from_service_account_info(json.loads(text), scopes=_SCOPES)
                except ValueError:
                    raise ValueError("the key for google is the JSON of a service account") from None
                self._loaded = text
            if not self._credentials.valid:
                await asyncio.get_running_loop().run_in_executor(None, self._renew)
        return [("Authorization", f"Bearer {self._credentials.token}")]

    def _renew(self) -> None:
        from google.auth.exceptions import GoogleAuthError

        try:
            self._credentials.refresh(self._transport())
        except GoogleAuthError as error:
            raise ValueError(f"Google gives no token: {type(error).__name__}") from None


async def _read(key: Key) -> str:
    try:
        return await key.read()
    except CloisterError as error:
        raise ValueError(error.message) from None


def _missing(package: str, extra: str, upstream: Upstream) -> UnsupportedError:
    return UnsupportedError(
        "package-missing", f"the Python package {package} is not installed",
        where=f".providers.{upstream.name}.auth", remedy=f"pip install 'cloister[{extra}]'",
    )  # fmt: skip
