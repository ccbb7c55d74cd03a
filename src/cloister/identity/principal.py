"""Who a run is, by name: a trust domain, a user, an agent and a run, written as a SPIFFE ID.

    spiffe://TRUST_DOMAIN/user/NAME/agent/AGENT/run/RUN

SPIFFE-ID (spiffe.io, "The SPIFFE Identity and Verifiable Identity Document", section 2) allows
letters, digits, dot, hyphen and underscore in a segment. Names that have others are refused
here, never rewritten: two principals must not share an identifier.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from cloister.errors import UnsupportedError, UsageError

_SEGMENT = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._-]{1,128}", re.ASCII)
_TRUST_DOMAIN = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,252}[a-z0-9])?", re.ASCII)
_ISSUER = re.compile(r"https://[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?(?::[0-9]{1,5})?(?:/[A-Za-z0-9._~/-]{0,200})?")
_BY_NUMBER = re.compile(r"uid-[0-9]+")
_PATH = re.compile(r"/user/([^/]+)/agent/([^/]+)/run/([^/]+)")


class Principal(NamedTuple):
    """One run of one agent of one user, in one trust domain."""

    trust_domain: str
    user: str
    agent: str
    run: str

    @property
    def spiffe_id(self) -> str:
        """The identifier, as it stands in `sub`."""
        return f"spiffe://{self.trust_domain}/user/{self.user}/agent/{self.agent}/run/{self.run}"


def principal(trust_domain: str, user: str, agent: str, run: str) -> Principal:
    """Return a principal whose parts may stand in a SPIFFE ID.

    Raises:
        UnsupportedError: a name holds a character that has no place there.
    """
    check_trust_domain(trust_domain)
    for what, name in (("user", user), ("agent", agent), ("run", run)):
        if not _SEGMENT.fullmatch(name):
            raise UnsupportedError(
                "identity-name",
                f"the {what} {name!r} cannot stand in a SPIFFE ID: letters, digits, '.', '-' and '_' can",
            )
    return Principal(trust_domain, user, agent, run)


def parse(spiffe_id: str) -> Principal | None:
    """Return the principal that an identifier names, or None when it is none of ours."""
    scheme, _, rest = spiffe_id.partition("://")
    domain, slash, path = rest.partition("/")
    match = _PATH.fullmatch(slash + path)
    if scheme != "spiffe" or match is None:
        return None
    try:
        return principal(domain, *match.groups())
    except (UnsupportedError, UsageError):
        return None


def user_segment(name: str, uid: int) -> str:
    """Return how a user is written: the name, or `uid-NUMBER` where the name (of a directory service) cannot be.

    A user really named `uid-7` is written by number as well, so that nobody can be taken for another.
    """
    return name if _SEGMENT.fullmatch(name) and not _BY_NUMBER.fullmatch(name) else f"uid-{uid}"


def check_trust_domain(text: str) -> str:
    """Return a trust domain: a name in lower case (SPIFFE-ID, section 2.1).

    Raises:
        UsageError: it is none.
    """
    if not _TRUST_DOMAIN.fullmatch(text):
        raise UsageError("trust-domain-invalid", f"{text!r} is no trust domain", remedy="a name such as example.org")
    return text


def check_issuer(text: str) -> str:
    """Return an `iss` other than the trust domain's own: an https URL, as third parties with discovery want it.

    Raises:
        UsageError: it is none.
    """
    if not _ISSUER.fullmatch(text):
        raise UsageError("issuer-invalid", f"{text!r} is no https URL", remedy="such as https://id.example.org")
    return text


def default_trust_domain(hostname: str) -> str:
    """Return the trust domain of a host that was given none: its name, as far as that can be one."""
    name = re.sub(r"[^a-z0-9._-]", "-", hostname.lower()).strip("._-")[:200]
    return name if name and _TRUST_DOMAIN.fullmatch(name) else "localhost"
