"""Fixtures of the relay tests."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from cloister.policy.model import Egress

sys.path.insert(0, str(Path(__file__).parent))  # for relay_support, whatever pytest's import mode

from relay_support import Mitm, Relay


@pytest.fixture
def relay(tmp_path: Path) -> Callable[..., Relay]:
    """Make a relay: `relay(allow=[...], private=[...], table={...})`."""

    def make(**options: Any) -> Relay:
        keys = {key: options.pop(key) for key in ("mode", "allow", "deny", "private") if key in options}
        egress = Egress(**{key: tuple(v) if isinstance(v, list) else v for key, v in keys.items()})
        return Relay(tmp_path / "relay.sock", egress, **options)

    return make


@pytest.fixture
def run() -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Run a coroutine on uvloop, with a bound in time."""

    def runner(coroutine: Coroutine[Any, Any, Any], timeout_s: float = 30) -> Any:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
            return loop.run(asyncio.wait_for(coroutine, timeout_s))

    return runner


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Make a certificate and key for `tls.test` with the openssl command."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=tls.test"]
    command += ["-addext", "subjectAltName=DNS:tls.test,DNS:other.test", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


@pytest.fixture(scope="session")
def mitm(tmp_path_factory: pytest.TempPathFactory) -> Mitm:
    """Make the two authorities of the tests about TLS that ends at the broker."""
    return Mitm(tmp_path_factory.mktemp("mitm"))
