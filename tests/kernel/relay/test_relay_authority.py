"""Contexts for hosts whose TLS ends at the broker: made once, kept in bounds, renewed, and no key in any file."""

from __future__ import annotations

import os
import ssl
import time

import pytest

from cloister.credentials.certificates import make_authority
from cloister.relay import authority as tested
from cloister.relay.authority import Authority
from cloister.relay.trust import client_context

pytestmark = pytest.mark.kernel


def shaken(server: ssl.SSLContext, authority: bytes, host: str) -> dict:
    """Return the certificate that a client of the authority accepts for a host."""
    client = ssl.create_default_context(cadata=authority.decode())
    client.set_alpn_protocols(["h2"])
    return shake(client, server, host)


def shake(client: ssl.SSLContext, server: ssl.SSLContext, host: str) -> dict:
    """Make a handshake in memory; return the server's certificate."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = client.wrap_bio(down, up, server_hostname=host)
    other = server.wrap_bio(up, down, server_side=True)
    for _ in range(4):
        for end in (one, other):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert one.selected_alpn_protocol() == "h2"
    return one.getpeercert() or {}


@pytest.mark.parametrize(("host", "kind"), [("a.test", "DNS"), ("127.0.0.1", "IP Address"), ("::1", "IP Address")])
def test_a_client_of_the_authority_accepts_its_contexts(host, kind):
    """The certificate of a context is valid for its host, by name or address, and for that one only."""
    pair = make_authority(time.time())
    names = shaken(Authority(pair).context(host), pair.cert_pem, host)["subjectAltName"]
    assert [name[0] for name in names] == [kind]
    with pytest.raises(ssl.SSLCertVerificationError):
        shaken(Authority(pair).context("b.test"), pair.cert_pem, host)


def test_contexts_are_kept_for_a_day_and_a_clock_may_step():
    """The same context serves until a day has passed in either direction; then a new one is valid at that time."""
    now = [time.time()]
    made = Authority(make_authority(now[0]), lambda: now[0])
    first = made.context("a.test")
    now[0] += 86_000
    assert made.context("a.test") is first
    now[0] += 1000
    second = made.context("a.test")
    assert second is not first
    now[0] -= 2 * 86_400
    assert made.context("a.test") is not second


def test_the_number_of_contexts_is_bounded(monkeypatch):
    """An agent that asks for many hosts does not fill the broker's memory; the host used last is kept."""
    monkeypatch.setattr(tested, "MAX_HOSTS", 3)
    made = Authority(make_authority(time.time()))
    kept = made.context("a.test")
    for index in range(5):
        made.context(f"{index}.test")
        assert made.context("a.test") is kept
    assert len(made._contexts) == 3


def test_no_key_is_left_in_a_file_or_descriptor(monkeypatch):
    """The key is given to OpenSSL encrypted, in memory without a name, and no descriptor stays open."""
    written = []
    original = os.memfd_create

    def watched(name, flags):
        handle = original(name, flags)
        written.append(handle)
        return handle

    monkeypatch.setattr(os, "memfd_create", watched)
    loaded = []

    load = ssl.SSLContext.load_cert_chain

    def watched_load(context, certfile, keyfile=None, password=None):
        with open(certfile, "rb") as file:
            loaded.append(file.read())
        load(context, certfile, keyfile, password)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", watched_load)
    before = set(os.listdir("/proc/self/fd"))
    Authority(make_authority(time.time())).context("a.test")
    assert set(os.listdir("/proc/self/fd")) == before
    assert len(written) == 1
    assert b"BEGIN ENCRYPTED PRIVATE KEY" in loaded[0]
    assert b"BEGIN PRIVATE KEY" not in loaded[0]


def test_no_key_of_a_connection_is_logged(monkeypatch, tmp_path):
    """SSLKEYLOGFILE in the broker's environment writes nothing: whoever reads that file could read the secrets."""
    log = tmp_path / "keys"
    monkeypatch.setenv("SSLKEYLOGFILE", str(log))
    pair = make_authority(time.time())
    (tmp_path / "ca.pem").write_bytes(pair.cert_pem)
    assert ssl.create_default_context().keylog_filename == str(log)
    client = client_context(True, str(tmp_path / "ca.pem"))
    shake(client, Authority(pair).context("a.test"), "a.test")
    assert "SECRET" not in log.read_text()


def test_the_store_of_the_brokers_environment_counts(monkeypatch, tmp_path):
    """SSL_CERT_FILE replaces the system's store: a server of that authority is trusted, and only with its name."""
    pair = make_authority(time.time())
    (tmp_path / "ca.pem").write_bytes(pair.cert_pem)
    server = Authority(pair).context("a.test")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(client_context(True), server, "a.test")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    assert shake(client_context(True), server, "a.test")["subjectAltName"] == (("DNS", "a.test"),)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(client_context(True), server, "b.test")
