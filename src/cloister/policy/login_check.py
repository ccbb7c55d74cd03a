"""What may stand in a `[login]` table: addresses that tokens can be sent to, redirects that stay on this machine.

The token endpoint gets everything worth stealing, so it is https or this machine itself; and a redirect
that led elsewhere would hand the code to whoever listens there.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from cloister.policy.document import Mistakes
from cloister.policy.hosts import parse_rule
from cloister.policy.login import Login
from cloister.policy.scanner import Path
from cloister.policy.values import check_inner_path

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_PARAMETER = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_SCOPE = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]{1,128}")  # RFC 6749 section 3.3
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}")  # token, RFC 9110 section 5.6.2
_OWN_PARAMETERS = frozenset(
    {"response_type", "client_id", "redirect_uri", "scope", "state", "code_challenge", "code_challenge_method"}
)


def check_login(login: Login | None, mistakes: Mistakes) -> None:
    """Note every mistake of meaning in a `[login]` table, where a preset has one."""
    if login is None:
        return
    _check_addresses(login, mistakes)
    _check_words(login, mistakes)
    if not login.hosts:
        mistakes.add(("login", "hosts"), "name the hosts the access token may be sent to")
    for index, host in enumerate(login.hosts):
        _check_host(host, ("login", "hosts", index), mistakes)
    if bool(login.product) != bool(login.product_file):
        mistakes.add(("login", "product"), "product and product_file go together")
    if login.product_file:
        try:
            check_inner_path(login.product_file)
        except ValueError as error:
            mistakes.add(("login", "product_file"), str(error))


def _check_addresses(login: Login, mistakes: Mistakes) -> None:
    for key in ("token_url", "authorize_url", "device_url", "revoke_url", "paste_redirect"):
        url = getattr(login, key)
        if (url or key == "token_url") and not is_endpoint(url):
            mistakes.add(("login", key), "not an https:// address", "http:// is for loopback only")
    if not login.authorize_url and not login.device_url:
        mistakes.add(("login",), "neither authorize_url nor device_url is given, so nobody can log in")
    for index, address in enumerate(login.redirect):
        if not is_redirect(address):
            remedy = 'redirect = ["http://127.0.0.1:{port}/callback"]'
            mistakes.add(("login", "redirect", index), "not a loopback address with a port and a path", remedy)


def _check_words(login: Login, mistakes: Mistakes) -> None:
    if not re.fullmatch(r"[\x21-\x7e]{1,256}", login.client_id):
        mistakes.add(("login", "client_id"), "a client id is 1 to 256 printable characters without spaces")
    for index, scope in enumerate(login.scopes):
        if not _SCOPE.fullmatch(scope):
            mistakes.add(("login", "scopes", index), "not one scope")
    for name in login.authorize_parameters:
        if not _PARAMETER.fullmatch(name) or name in _OWN_PARAMETERS:
            mistakes.add(("login", "authorize_parameters", name), "not a parameter that can be added")
    for name, value in login.headers.items():
        if not _HEADER.fullmatch(name) or not re.fullmatch(r"[\x20-\x7e]*", value):
            mistakes.add(("login", "headers", name), "not a header")


def is_endpoint(url: str) -> bool:
    """Return whether tokens may be sent to an address: https, or http to a loopback address; nothing odd in it."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return False
    if not url.isascii() or not url.isprintable() or " " in url or not host or "@" in parts.netloc or parts.fragment:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and host in _LOOPBACK)


def is_redirect(address: str) -> bool:
    """Return whether an address can be listened on for a redirect: plain HTTP on loopback (RFC 8252 section 7.3)."""
    filled = address.replace("{port}", "1")
    try:
        parts = urlsplit(filled)
        port = parts.port
    except ValueError:
        return False
    return (
        is_endpoint(filled)
        and parts.scheme == "http"
        and parts.hostname in ("127.0.0.1", "localhost")
        and bool(port)
        and parts.path.startswith("/")
        and not parts.query
    )


def _check_host(host: str, path: Path, mistakes: Mistakes) -> None:
    try:
        parse_rule(host)
    except ValueError as error:
        mistakes.add(path, str(error))
        return
    if "*" in host or "/" in host:
        mistakes.add(path, "a token goes to named hosts only")
