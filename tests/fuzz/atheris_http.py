"""Coverage-guided fuzzing of HTTP heads: `python tests/fuzz/atheris_http.py -max_total_time=60`.

What goes in is a client's bytes; what must hold is said about the head that would be written.
"""

from __future__ import annotations

import contextlib
import sys

import atheris

with atheris.instrument_imports():
    import httptools

    from cloister.egress import http1


class Head:
    """Collects one head with llhttp, as the relay does."""

    def __init__(self) -> None:
        self.url, self.fields = b"", []

    def on_url(self, url: bytes) -> None:
        """Collect."""
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect."""
        self.fields.append((name, value))


def one(data: bytes) -> None:
    """Refuse, or write a head with one Host, one framing and one end."""
    head = Head()
    parser = httptools.HttpRequestParser(head)
    with contextlib.suppress(httptools.HttpParserError, httptools.HttpParserUpgrade):
        parser.feed_data(b"POST http://a.test/ HTTP/1.1\r\n" + data + b"\r\n\r\n")
    with contextlib.suppress(http1.HttpError):
        line = http1.parse_absolute("POST", head.url)
        http1.check_headers(head.fields)
        body = http1.request_body(head.fields, "1.1")
        written = http1.request_head("POST", line, head.fields, body).lower()
        framings = written.count(b"\r\ncontent-length:") + written.count(b"\r\ntransfer-encoding:")
        if written.count(b"\r\n\r\n") != 1 or written.count(b"\r\nhost:") != 1 or framings > 1:
            raise AssertionError(written)


atheris.Setup(sys.argv, one)
atheris.Fuzz()
