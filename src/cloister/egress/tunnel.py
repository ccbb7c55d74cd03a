"""What the first bytes inside a tunnel must be.

A tunnel was allowed for a name, so TLS inside it must ask for that same name: with another
one, or none, a shared front server (CDN) would carry the client anywhere. On the ports of
TLS-only services anything else than TLS is refused; on other ports a client may speak what it
likes (SSH, Git, SMTP with STARTTLS, plain HTTP), but if it speaks TLS the name is checked.
What is encrypted later (a Host header that differs, a name inside ECH) cannot be seen here.
"""

from __future__ import annotations

from cloister.egress.clienthello import Hello
from cloister.egress.decision import Target, Verdict
from cloister.egress.hosts import HostError, parse_host

ACCESS_DENIED = bytes((21, 3, 3, 0, 2, 2, 49))
"""A fatal alert in clear (RFC 8446, section 6), for a TLS client whose tunnel is cut."""
TLS_ONLY_PORTS = frozenset({443, 465, 563, 636, 853, 989, 990, 992, 993, 994, 995, 5061, 8443})
"""Ports on which the client speaks first and speaks TLS (IANA registry, and 8443 by custom)."""


def judge_hello(target: Target, hello: Hello) -> Verdict | None:
    """Return why a tunnel must be cut, or None when its first bytes are in order."""
    if hello.kind == "not-tls":
        if target.port not in TLS_ONLY_PORTS:
            return None
        return Verdict("deny", "not-tls", explanation=f"port {target.port} carries TLS, and these bytes are none")
    if hello.kind == "broken":
        return Verdict("deny", "tls-hello-invalid", explanation="the TLS ClientHello cannot be read")
    if not hello.server_name:
        if target.host.address is not None:
            return None
        return Verdict("deny", "sni-missing", explanation="TLS to a name must send that name (SNI)")
    try:
        asked = parse_host(hello.server_name)
    except HostError as error:
        return Verdict("deny", "sni-mismatch", explanation=f"the name in the TLS ClientHello is no host: {error}")
    if asked.text == target.host.text:
        return None
    why = f"the tunnel is for {target.host.text}, the TLS ClientHello asks for {asked.text}"
    return Verdict("deny", "sni-mismatch", explanation=why)
