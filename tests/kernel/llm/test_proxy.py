"""The inference proxy on real sockets: what passes, what is refused, what is counted."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from cloister.credentials.bindings import Request
from cloister.credentials.certificates import make_authority
from cloister.credentials.sigv4 import Keys, sign
from cloister.relay.authority import Authority
from cloister.relay.llm.service import Bounds
from cloister.relay.trust import client_context
from support.model_rig import (
    ANSWER,
    DELTA,
    END,
    FINISH,
    KEY,
    MESSAGE,
    PLACEHOLDER,
    START,
    STREAM_HEAD,
    Rig,
    Script,
    chunk,
    read_reply,
    reset,
    whole,
)  # fmt: skip

pytestmark = pytest.mark.kernel

Test = Callable[[], Awaitable[None]]
STREAM = {**MESSAGE, "stream": True}
CHAT = {"model": "gpt-x", "max_tokens": 50, "messages": []}
WHOLE_STREAM = [STREAM_HEAD + chunk(START), chunk(DELTA) * 3, chunk(FINISH) + END]


def run(test: Test) -> None:
    """Run a test in the event loop that the product uses."""

    async def bounded() -> None:
        async with asyncio.timeout(30):
            await test()

    uvloop.run(bounded())


def test_the_placeholder_stays_and_the_real_key_leaves() -> None:
    """CF1: in either field, the agent's key is checked and replaced; no other credential of its passes."""

    async def test() -> None:
        async with Script() as up, Rig(up.url) as rig:
            await rig.ask(cookie="a=b", x_amz_security_token="t", anthropic_beta="b-1, b-2")
            await rig.ask(authorization=f"Bearer {PLACEHOLDER}", x_api_key="")
            await rig.ask(authorization=f"bearer {PLACEHOLDER}", x_api_key="other")
            for asked in up.asked:
                assert asked.field("x-api-key") == [KEY]
                assert PLACEHOLDER.encode() not in asked.head
                assert not asked.field("authorization") + asked.field("cookie") + asked.field("x-amz-security-token")
                assert asked.field("accept-encoding") == ["identity"]
            assert up.asked[0].field("anthropic-beta") == ["b-1, b-2"]
            assert up.connections == 1

    run(test)


@pytest.mark.parametrize("fields", [{"x_api_key": ""}, {"x_api_key": "wrong"}, {"x_api_key": KEY}])
def test_no_key_and_wrong_keys_are_refused(fields: dict[str, str]) -> None:
    """401 in the protocol's own shape; nothing reaches the upstream."""

    async def test() -> None:
        async with Script() as up, Rig(up.url) as rig:
            reply = await rig.ask(**fields)
            assert (reply.status, reply.json["error"]["type"]) == (401, "authentication_error")
            assert reply.fields["x-cloister-reason"] == "key-invalid"
            assert not up.asked

    run(test)


def test_bodies_pass_byte_for_byte() -> None:
    """FINDINGS 2.2: nothing is serialised again, whatever its spacing, order and unknown fields."""
    body = b'{ "x_unknown" : [1,  2.50, "\\u00e9\\/"] , "model":"claude-x",\n"max_tokens": 7, "messages":[ ] }'

    async def test() -> None:
        async with Script() as up, Rig(up.url) as rig:
            assert (await rig.ask(body, "/v1/messages?beta=true")).body == ANSWER
            assert up.asked[0].body == body
            assert up.asked[0].head.startswith(b"POST /v1/messages?beta=true HTTP/1.1\r\n")

    run(test)


def test_errors_of_the_upstream_pass_as_they_are() -> None:
    """529 is passed on with its Retry-After like 429 (headroom #1495); agents retry by themselves; it costs nothing."""

    async def test() -> None:
        body = b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}'
        answer = whole(body, "529 Overloaded", "retry-after: 7\r\nrequest-id: req_1\r\n")
        async with Script([answer]) as up, Rig(up.url, tokens_per_day=300) as rig:
            for _ in range(5):
                reply = await rig.ask()
                assert (reply.status, reply.body, reply.fields["retry-after"]) == (529, body, "7")
            rows = await rig.settled(5)
            assert {(row.status, row.input_tokens, row.request_id) for row in rows} == {(529, 0, "req_1")}
            assert len(up.asked) == 5

    run(test)


def test_retries_are_the_policys_and_one_call() -> None:
    """Only as often as `retries` says, before a byte was seen; one row, one reservation."""

    async def test() -> None:
        failed = whole(b"{}", "503 Unavailable", "retry-after: 0\r\n")
        async with Script([failed], [failed], [whole()]) as up, Rig(up.url, provider={"retries": 2}) as rig:
            assert (await rig.ask()).body == ANSWER
            (row,) = await rig.settled()
            assert (row.attempts, row.status, row.output_tokens, row.source) == (3, 200, 5, "provider")
        async with Script([failed]) as up, Rig(up.url, provider={"retries": 1}) as rig:
            assert (await rig.ask()).status == 503
            assert len(up.asked) == 2

    run(test)


def test_a_long_retry_after_is_not_waited_for() -> None:
    """It is passed on at once: the agent knows better what to do with an hour."""

    async def test() -> None:
        failed = whole(b"{}", "429 Too Many", "retry-after: 3600\r\n")
        async with Script([failed]) as up, Rig(up.url, provider={"retries": 3}) as rig:
            reply = await rig.ask()
            assert (reply.status, reply.fields["retry-after"], len(up.asked)) == (429, "3600", 1)

    run(test)


def test_attempts_that_may_have_been_billed_count() -> None:
    """A gateway that gave up may have worked on: its attempt counts as a whole, and the budget holds over retries."""

    async def test() -> None:
        failed = whole(b"{}", "504 Timeout", "retry-after: 0\r\n")
        async with Script([failed], [whole()]) as up, Rig(up.url, provider={"retries": 1}) as rig:
            assert (await rig.ask()).status == 200
            (row,) = await rig.settled()
            assert row.output_tokens == 100 + 5
            assert row.source == "estimated"
        tight = {"provider": {"retries": 1}, "tokens_per_day": 250}
        async with Script([failed], [whole()]) as up, Rig(up.url, **tight) as rig:
            assert (await rig.ask()).status == 504
            assert len(up.asked) == 1

    run(test)


def test_a_key_that_was_rotated_is_asked_for_anew() -> None:
    """After a 401 once; the agent sees nothing of it. Where the key is the same, the 401 is the agent's to see."""

    async def test() -> None:
        refused = whole(b'{"error":"no"}', "401 Unauthorized")
        async with Script([whole()], [refused], [whole()], [refused]) as up, Rig(up.url) as rig:
            await rig.ask()
            rig.key.value = "made-up-new-key"
            assert (await rig.ask()).status == 200
            assert up.asked[-1].field("x-api-key") == ["made-up-new-key"]
            reply = await rig.ask()
            assert (reply.status, reply.body) == (401, b'{"error":"no"}')
            assert rig.key.rejections == 2
            assert len(up.asked) == 4

    run(test)


def test_the_next_provider_is_tried_where_the_policy_says_so() -> None:
    """`fallback`: one that is down, or refuses with 5xx; without it the agent gets the answer."""

    async def test() -> None:
        async with Script([whole(b"{}", "503 No")]) as bad, Script() as good:
            async with Rig(bad.url, good.url, fallback=True) as rig:
                assert (await rig.ask()).body == ANSWER
                (row,) = await rig.settled()
                assert (row.provider, row.attempts) == ("up1", 2)
            async with Rig(bad.url, good.url) as rig:
                assert (await rig.ask()).status == 503
            async with Rig("http://127.0.0.1:1", good.url, fallback=True) as rig:
                for _ in range(8):
                    assert (await rig.ask()).body == ANSWER
                assert rig.supplies[0].resting
                assert [row.attempts for row in rig.books.rows][-1] == 1

    run(test)


def test_an_upstream_that_never_answers_is_given_up() -> None:
    """`first_byte_timeout`: 504, and the reservation counts, since nobody knows what was billed."""

    async def test() -> None:
        async with Script([9.0]) as up, Rig(up.url, provider={"first_byte_timeout": "1s"}) as rig:
            reply = await rig.ask()
            assert (reply.status, reply.fields["x-cloister-reason"]) == (504, "first-byte-timeout")
            (row,) = await rig.settled()
            assert (row.outcome, row.source, row.output_tokens) == ("upstream-failed", "estimated", 100)

    run(test)


def test_compressed_answers_are_passed_on_and_counted() -> None:
    """Not asked for, but some send them."""

    async def test() -> None:
        packed = gzip.compress(ANSWER)
        async with Script([whole(packed, fields="content-encoding: gzip\r\n")]) as up, Rig(up.url) as rig:
            reply = await rig.ask()
            assert (reply.body, reply.fields["content-encoding"]) == (packed, "gzip")
            (row,) = await rig.settled()
            assert (row.input_tokens, row.output_tokens, row.source) == (11, 5, "provider")

    run(test)


def test_budgets_hold_against_parallel_requests() -> None:
    """LiteLLM #34732: twenty at once, room for three; exactly three reach the upstream."""

    async def test() -> None:
        async with Script([0.3, whole()]) as up, Rig(up.url, tokens_per_day=3 * 175) as rig:
            replies = await asyncio.gather(*(rig.ask() for _ in range(20)))
            assert sorted(reply.status for reply in replies) == [200] * 3 + [429] * 17
            assert len(up.asked) == 3
            refused = next(reply for reply in replies if reply.status == 429)
            assert refused.fields["x-cloister-reason"] == "tokens-per-day"
            assert int(refused.fields["retry-after"]) > 0
            assert refused.json["error"]["type"] == "rate_limit_error"
            assert (await rig.ask()).status == 200

    run(test)


def test_nothing_is_sent_that_cannot_be_written_down() -> None:
    """A full disk under the ledger: 503, and no call; the next one works when there is room."""

    async def test() -> None:
        async with Script() as up, Rig(up.url, concurrency=1) as rig:
            rig.books.full = True
            reply = await rig.ask()
            assert (reply.status, reply.fields["x-cloister-reason"]) == (503, "ledger-unavailable")
            assert not up.asked
            rig.books.full = False
            assert (await rig.ask()).status == 200

    run(test)


def test_a_budget_in_dollars_needs_a_price() -> None:
    """A guess would be no budget; without such a budget the model works, and costs what nobody knows."""

    async def test() -> None:
        strange = {**MESSAGE, "model": "unknown-1"}
        async with Script() as up, Rig(up.url, cost_per_day_usd=1.0) as rig:
            reply = await rig.ask(strange)
            assert (reply.status, reply.fields["x-cloister-reason"]) == (403, "price-unknown")
            assert "prices.toml" in reply.json["error"]["message"]
        async with Script() as up, Rig(up.url) as rig:
            assert (await rig.ask(strange)).status == 200

    run(test)


def test_a_person_may_grant_a_budget_once_more() -> None:
    """`on_exhausted = "ask"`: the request waits for the answer."""

    async def test() -> None:
        async with Script() as up, Rig(up.url, tokens_per_day=180, on_exhausted="ask") as rig:
            answers = [True, False]

            async def ask(_refusal: object) -> bool:
                return answers.pop(0)

            rig.caller.ask = ask
            await rig.ask()
            assert (await rig.ask()).status == 200
            assert (await rig.ask({**MESSAGE, "max_tokens": 300})).status == 429
            assert answers == []

    run(test)


def test_models_are_listed_in_the_clients_protocol() -> None:
    """Only what is allowed, with aliases; Claude Code and OpenAI's clients share one path."""

    async def test() -> None:
        listed = json.dumps({"data": [{"id": "claude-a", "x": 1}, {"id": "gpt-b"}], "has_more": False}).encode()
        llm = {"models": ("claude-*",), "aliases": {"fast": "claude-a"}}
        async with Script([whole(listed)]) as up, Rig(up.url, **llm) as rig:
            reply = await rig.ask(None, "/v1/models?limit=1000", "GET")
            assert [one["id"] for one in reply.json["data"]] == ["fast", "claude-a"]
            assert reply.json["data"][1]["x"] == 1
            assert up.asked[0].head.startswith(b"GET /v1/models?limit=1000 ")
        llm["provider"] = {"protocol": "openai"}
        async with Script([whole(b"{}", "404 Not Found")]) as up, Rig(up.url, **llm) as rig:
            reply = await rig.ask(None, "/v1/models", "GET", authorization=f"Bearer {PLACEHOLDER}", x_api_key="")
            assert [one["id"] for one in reply.json["data"]] == ["fast"]

    run(test)


def test_what_is_no_route_is_refused_in_its_own_shape() -> None:
    """404 for strangers, 426 for WebSocket so that Codex falls back; the connection stays usable."""

    async def test() -> None:
        async with Script() as up, Rig(up.url) as rig:
            assert (await rig.ask(MESSAGE, "/v1/files")).status == 404
            assert (await rig.ask(None, "/v1/messages", "GET")).json["type"] == "error"
            fields = {"upgrade": "websocket", "connection": "upgrade", "sec_websocket_key": "x"}
            reply = await rig.ask(None, "/v1/responses", "GET", **fields)
            assert (reply.status, reply.json["error"]["code"]) == (426, "websocket-unsupported")
            assert (await rig.ask(None, "/", "HEAD")).status == 200
            reader, writer = await rig.connect()
            writer.write(rig.request(None, "/v1/nothing", "GET") + rig.request() + rig.request())
            assert [(await read_reply(reader)).status for _ in range(3)] == [404, 200, 200]
            writer.close()
            assert len(up.asked) == 2

    run(test)


def test_bodies_are_bounded() -> None:
    """By their announced length, and by what comes; 413 either way, and memory is given back."""

    async def test() -> None:
        async with Script() as up, Rig(up.url, bounds=Bounds(body_bytes=100_000)) as rig:
            assert (await rig.ask(b"x" * 100_001)).status == 413
            reader, writer = await rig.connect()
            head = rig.request(None, transfer_encoding="chunked").replace(b"content-length: 0\r\n", b"")
            writer.write(head + (b"8000\r\n" + b"x" * 0x8000 + b"\r\n") * 4)
            assert (await read_reply(reader)).status == 413
            writer.close()
            big = {**MESSAGE, "messages": [{"role": "user", "content": "y" * 90_000}]}
            assert (await rig.ask(big)).status == 200
            assert len(up.asked) == 1

    run(test)


def test_a_client_that_waits_for_100_gets_it() -> None:
    """Curl sends Expect with every larger body."""

    async def test() -> None:
        async with Script() as up, Rig(up.url) as rig:
            assert (await rig.ask(expect="100-continue")).status == 200
            assert not up.asked[0].field("expect")

    run(test)


def test_a_kept_connection_that_just_closed_is_no_failure() -> None:
    """The request goes to a new one, once; nothing had been answered."""

    async def test() -> None:
        async with Script([whole()], [reset], [whole()]) as up, Rig(up.url) as rig:
            assert (await rig.ask()).status == 200
            assert (await rig.ask()).status == 200
            assert up.connections == 2

    run(test)


def test_those_who_wait_for_one_budget_share_the_question() -> None:
    """Five requests, one question, one grant; who still finds no room is asked for anew."""

    async def test() -> None:
        async with Script() as up, Rig(up.url, tokens_per_day=180, on_exhausted="ask") as rig:
            asked = []

            async def ask(_refusal: object) -> bool:
                asked.append(1)
                await asyncio.sleep(0.1)
                return len(asked) == 1

            rig.caller.ask = ask
            await rig.ask()
            replies = await asyncio.gather(*(rig.ask({**MESSAGE, "max_tokens": 130}) for _ in range(4)))
            assert sorted(reply.status for reply in replies) == [200, 429, 429, 429]
            assert len(asked) == 2

    run(test)


def test_requests_to_aws_are_signed() -> None:
    """`sigv4`: over the body that is sent; our other implementation agrees, and no key is on the wire."""
    keys = Keys("AKIDEXAMPLE", "made-up-secret", "made-up-session")

    async def test() -> None:
        async with Script() as up, Rig(up.url, provider={"auth": "sigv4", "region": "us-east-1"}, max_tokens=9) as rig:
            rig.key.value = f"{keys.key_id}:{keys.secret_key}:{keys.session_token}"
            assert (await rig.ask(path="/v1/messages?x=1", content_type="application/json")).status == 200
            (asked,) = up.asked
            assert asked.json["max_tokens"] == 9
            assert keys.secret_key.encode() not in asked.head
            headers = [tuple(line.split(b": ", 1)) for line in asked.head.split(b"\r\n")[1:] if line]
            host = up.url.removeprefix("http://")
            again = sign(Request("POST", "/v1/messages?x=1", headers, asked.body, host), keys)
            (expected,) = [value for name, value in again.headers if name == b"authorization"]
            assert asked.field("authorization") == [expected.decode()]

    run(test)


def test_prompts_are_redacted_before_they_leave() -> None:
    """What the owner's patterns match does not reach the upstream; the event says how much, not what."""

    async def test() -> None:
        events = []
        async with Script() as up, Rig(up.url, redact=(r"Project \w+",), redact_secrets=True) as rig:
            rig.caller.record = lambda kind, fields: events.append((kind, fields["matches"]))
            text = f"about Project Falcon, key ghp_{'a1B2' * 9}"
            await rig.ask({**MESSAGE, "messages": [{"role": "user", "content": text}]})
            assert up.asked[0].json["messages"][0]["content"] == "about [redacted], key [redacted]"
            assert events == [("redacted", 2)]

    run(test)


@pytest.mark.parametrize("trusted", [True, False])
def test_upstreams_are_checked(trusted: bool, tmp_path: Path) -> None:
    """TLS with the host's name and a trusted certificate, kept open for the next call; else 502, and no key leaves."""
    authority = make_authority(time.time())
    (tmp_path / "ca.pem").write_bytes(authority.cert_pem)

    async def test() -> None:
        async with Script(tls=Authority(authority).context("localhost")) as up, Rig(up.url) as rig:
            rig.supplies[0]._trust = lambda: client_context(False, str(tmp_path / "ca.pem") if trusted else None)
            replies = [await rig.ask() for _ in range(2)]
            if trusted:
                assert [reply.status for reply in replies] == [200, 200]
                assert up.connections == 1
            else:
                assert {reply.fields["x-cloister-reason"] for reply in replies} == {"connect-failed"}
                assert not up.asked

    run(test)


def test_a_prompt_cannot_keep_the_proxy_busy() -> None:
    """Bodies that would take a naive reader minutes: long runs of base64 signs, endless members, deep nesting."""
    long = b"A" * 4095 + b" "
    bodies = [
        b'{"model":"a","max_tokens":5,"x":"' + long * 2000 + b'"}',
        b"{" + b",".join(b'"k%d":1' % index for index in range(200_000)) + b',"model":"a"}',
        b'{"model":"a","x":' + b"[" * 500_000 + b"]" * 500_000 + b"}",
        b'{"model":"a","x":"' + b"\\\\" * 2_000_000 + b'"}',
    ]

    async def test() -> None:
        async with Script() as up, Rig(up.url, redact=("zzz",)) as rig:
            begun = time.process_time()
            statuses = [(await rig.ask(body)).status for body in bodies]
            assert statuses == [200, 400, 400, 200]
            assert time.process_time() - begun < 5

    run(test)


def test_requests_to_google_carry_a_token_that_is_renewed() -> None:
    """`google`: the service account's key signs for an access token; the key itself stays here."""
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )

    async def test() -> None:
        granted = whole(b'{"access_token":"ya29.made-up","expires_in":3600,"token_type":"Bearer"}')
        async with Script([granted]) as issuer, Script() as up, Rig(up.url, provider={"auth": "google"}) as rig:
            account = {"type": "service_account", "client_email": "a@b.example", "token_uri": f"{issuer.url}/token"}
            rig.key.value = json.dumps({**account, "private_key": private.decode()})
            for _ in range(3):
                assert (await rig.ask()).status == 200
            assert up.asked[0].field("authorization") == ["Bearer ya29.made-up"]
            assert len(issuer.asked) == 1
            rig.key.value = "no account"
            reply = await rig.ask()
            assert (reply.status, reply.fields["x-cloister-reason"]) == (503, "key-unavailable")
            assert "no account" not in reply.json["error"]["message"]

    run(test)
