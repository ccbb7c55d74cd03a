"""Coverage-guided fuzzing of the SOCKS5 parsers: `python tests/fuzz/atheris_socks.py -max_total_time=60`."""

from __future__ import annotations

import contextlib
import sys

import atheris

with atheris.instrument_imports():
    from cloister.egress import socks
    from cloister.egress.hosts import HostError, parse_host


def one(data: bytes) -> None:
    """Parse, wait or refuse; a host that is accepted has one spelling."""
    with contextlib.suppress(socks.SocksError, HostError):
        socks.parse_greeting(data)
        request = socks.parse_request(data)
        if request is not None:
            host = parse_host(request.host)
            if parse_host(host.text) != host:
                raise AssertionError("the canonical spelling is not stable")


atheris.Setup(sys.argv, one)
atheris.Fuzz()
