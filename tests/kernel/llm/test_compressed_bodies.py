"""Compressed requests: what cannot be read is refused with what to do, and what was read is sent without its coding."""

from __future__ import annotations

import gzip
import json
import zlib

import pytest
import uvloop

from support.model_rig import MESSAGE, Rig, Script

pytestmark = pytest.mark.kernel
PLAIN = json.dumps(MESSAGE).encode()
BODIES = {
    "gzip": ("gzip", gzip.compress(PLAIN)),
    "gzip in capitals": ("GZIP", gzip.compress(PLAIN)),
    "two members": ("gzip", gzip.compress(PLAIN) + gzip.compress(PLAIN)),
    "twice": ("gzip, gzip", gzip.compress(gzip.compress(PLAIN))),
    "a bomb": ("gzip", gzip.compress(bytes(64 << 20))),
    "deflate": ("deflate", zlib.compress(PLAIN)),
    # What Codex sends with a ChatGPT login: a frame of Zstandard (RFC 8878) with one raw block.
    "zstd": ("zstd", bytes.fromhex("28b52ffd2000") + (len(PLAIN) << 3 | 1).to_bytes(3, "little") + PLAIN),
    "br": ("br", b"\x0b\x02\x80" + PLAIN + b"\x03"),
    "an unknown one": ("x-secret\t\xff", gzip.compress(PLAIN)),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_compressed_body_is_refused_with_what_to_do(name: str) -> None:
    """415 with a reason and the setting for Codex, nothing is sent, and a plain request works afterwards."""
    coding, body = BODIES[name]

    async def test() -> None:
        async with Script() as up, Rig(up.url) as rig:
            reply = await rig.ask(body, content_encoding=coding)
            assert reply.status == 415
            assert reply.json["error"]["type"] == "invalid_request_error"
            assert "enable_request_compression=false" in reply.json["error"]["message"]
            assert "secret" not in reply.json["error"]["message"]
            assert up.asked == []
            assert [row.reason for row in rig.books.refusals] == ["body-compressed"]
            assert (await rig.ask()).status == 200
            await rig.settled()

    uvloop.run(test())


@pytest.mark.parametrize("coding", ["identity", "gzip", "br"])
def test_what_was_read_is_what_is_sent(coding: str) -> None:
    """A readable body goes on without a coding, whatever its sender claims: no decoder can make another one of it."""

    async def test() -> None:
        async with Script() as up, Rig(up.url) as rig:
            assert (await rig.ask(content_encoding=coding)).status == 200
            assert up.asked[0].body == PLAIN
            assert up.asked[0].field("content-encoding") == []
            await rig.settled()

    uvloop.run(test())
