"""`egress.upstream_proxy`: from the policy or the environment to the proxy that is used."""

import pytest

from cloister.egress.hosts import parse_host
from cloister.errors import UnsupportedError
from cloister.runs.upstream import upstream_proxy

ENVIRONMENT = {"https_proxy": "http://me:p%40ss@proxy.example.org:3128/", "no_proxy": "example.net"}


def test_none_and_a_fixed_one() -> None:
    """Nothing means none, whatever the environment says; an address means that one, without credentials."""
    assert upstream_proxy("", ENVIRONMENT) is None
    proxy = upstream_proxy("http://10.0.0.1:8080", ENVIRONMENT)
    assert proxy is not None
    assert (proxy.host, proxy.port, proxy.authorization) == ("10.0.0.1", 8080, "")
    assert not proxy.direct.covers(parse_host("example.net"), 443)


def test_the_environment() -> None:
    """`env` takes https_proxy with its credentials, decoded, and no_proxy; the credentials are in no repr."""
    proxy = upstream_proxy("env", ENVIRONMENT)
    assert proxy is not None
    assert (proxy.host, proxy.port, proxy.authorization) == ("proxy.example.org", 3128, "Basic bWU6cEBzcw==")
    assert proxy.direct.covers(parse_host("example.net"), 443)
    assert "bWU6" not in repr(proxy)


@pytest.mark.parametrize("name", ["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"])
def test_every_spelling(name: str) -> None:
    """Either case, and the variable for all protocols; a bare host and port is HTTP. Nothing set is none."""
    proxy = upstream_proxy("env", {name: "proxy.example.org:3128"})
    assert proxy is not None
    assert proxy.name == "proxy.example.org:3128"
    assert upstream_proxy("env", {"http_proxy": "http://other:1"}) is None


@pytest.mark.parametrize("value", ["socks5h://a:1", "https://a:1", "http://:1", "http://[::1", "http://a:99999",
                                   "http://me:secret@a:1/path", "http://ä:1"])  # fmt: skip
def test_other_kinds_are_refused(value: str) -> None:
    """What cannot be used is an error, not a way round; the error shows no part of the value."""
    with pytest.raises(UnsupportedError) as caught:
        upstream_proxy("env", {"https_proxy": value})
    assert "secret" not in str(caught.value) + caught.value.where + caught.value.remedy
