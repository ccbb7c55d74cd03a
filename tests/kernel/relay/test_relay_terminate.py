"""TLS that ends at the broker, for the hosts a credential is bound to and only for those."""

from __future__ import annotations

import json

import pytest
from relay_support import LOCAL, LOOPBACK, OK, Upstream, answering, bridge, curl, read_head, tunnel_tls, until

from cloister.policy.model import EgressRule

pytestmark = pytest.mark.kernel

FAKE, REAL = "cloister-a-placeholder", "real-a-secret"


def test_curl_uses_a_secret_that_it_never_sees(relay, run, mitm):
    """A placeholder sent by curl arrives as the real token at the bound host, and the event names its credential."""
    seen: list[bytes] = []

    async def scenario():
        async with Upstream(answering(OK, seen), mitm.servers.context("a.test")) as up:
            broker = mitm.broker(a=("a.test", up.port))
            options = {"allow": [f"a.test:{up.port}"], **LOOPBACK, "table": LOCAL, "broker": broker}
            async with relay(**options, trust=mitm.trust) as r:
                await bridge(r, lambda proxy: use(proxy, up.port))
                await until(lambda: r.events)
                event = r.events[0]
                assert (event.protocol, event.host, event.method, event.path) == ("https", "a.test", "GET", "/x")
                assert (event.status, event.credentials, event.verdict) == (200, ("token",), "allow")
                assert FAKE not in repr(r.events)
                assert REAL not in repr(r.events)

    async def use(proxy, port):
        token = f"Authorization: Bearer {FAKE}"
        done = await curl("-x", proxy, "--cacert", str(mitm.ca), "-H", token, f"https://a.test:{port}/x?token=1")
        assert (done.returncode, done.stdout) == (0, b"ok"), done.stderr

    run(scenario())
    assert b"Bearer real-a-secret\r\n" in seen[0]
    assert FAKE.encode() not in seen[0]


def test_other_hosts_are_tunnelled_untouched(relay, run, mitm):
    """A host without a credential keeps its own TLS: the client sees the server's certificate, not ours."""

    async def scenario():
        async with Upstream(answering(OK), mitm.servers.context("b.test")) as up:
            broker = mitm.broker(a=("a.test", up.port))
            options = {"allow": [f"*.test:{up.port}"], **LOOPBACK, "table": LOCAL, "broker": broker}
            async with relay(**options, trust=mitm.trust) as r:
                reader, writer = await tunnel_tls(r, "b.test", up.port, mitm.trust(False))
                writer.write(b"GET / HTTP/1.1\r\nHost: b.test\r\nX: cloister-a-placeholder\r\n\r\n")
                assert (await read_head(reader)).startswith(b"HTTP/1.1 200")
                writer.close()
                await until(lambda: r.events)
                assert (r.events[0].protocol, r.events[0].credentials) == ("connect", ())

    run(scenario())


def test_rules_about_methods_and_paths_hold_inside(relay, run, mitm):
    """A rule that limits methods and paths is enforced on each request of a kept connection, where TLS ends here."""
    seen: list[bytes] = []

    async def scenario():
        async with Upstream(answering(OK, seen), mitm.servers.context("a.test")) as up:
            rule = EgressRule(host="a.test", port=up.port, methods=("GET",), paths=("/repos/**",))
            options = {"allow": [rule], **LOOPBACK, "table": LOCAL, "broker": mitm.broker(a=("a.test", up.port))}
            async with relay(**options, trust=mitm.trust) as r:
                reader, writer = await tunnel_tls(r, "a.test", up.port, mitm.client())
                wanted = [("GET", "/repos/x", 200), ("POST", "/repos/x", 403), ("GET", "/user", 403)]
                wanted += [("GET", "/repos/../user", 403), ("GET", "/repos/y?page=2", 200)]
                for method, path, status in wanted:
                    writer.write(f"{method} {path} HTTP/1.1\r\nHost: a.test:{up.port}\r\n\r\n".encode())
                    head = await read_head(reader)
                    assert int(head.split()[1]) == status, (method, path, head)
                    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                    body = await reader.readexactly(length)
                    if status == 403:
                        assert json.loads(body)["host"] == "a.test"
                writer.close()
                assert up.connections == 1
                reasons = [event.reason for event in r.events]
                assert reasons[1:4] == ["method-not-allowed", "path-not-allowed", "path-ambiguous"]
                assert [event.path for event in r.events][-1] == "/repos/y"

    run(scenario())
    assert len(seen) == 2
