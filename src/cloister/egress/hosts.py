"""Host spellings: one canonical form per host, or a refusal.

Every host that reaches a decision has passed `parse_host`, so a rule is compared with one
spelling only. Numbers are read as inet_aton(3) reads them (`127.1`, `0x7f.1`, `2130706433`),
since that is what the resolver of a careless client would dial; v4-mapped IPv6 becomes IPv4.
Names are plain LDH labels (RFC 1123, section 2.1) and `_`; a name in Unicode is refused, not
converted, because IDNA 2003 and 2008 disagree about what it would become. Nothing here
resolves a name or knows a policy.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

Address = IPv4Address | IPv6Address

PROXY_NAME = "cloister.internal"
"""The proxy itself: `GET http://cloister.internal/` answers with what this run may reach."""
HOST_LOOPBACK_NAME = "host.cloister.internal"
"""The loopback of the host; reachable only by an explicit rule with a port."""

_MAX_NAME = 253
_MAX_TEXT = _MAX_NAME + 1 + len(":65535")  # a trailing dot and a port
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_NUMBER = re.compile(r"0x[0-9a-f]*|[0-9]+")
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_MAX_PORT = 65535

# Names that no public resolver answers, or that resolvers answer from the local network:
# RFC 6761, 6762 (.local), 7686 (.onion), 8375 (home.arpa), 9476 (.alt), ICANN 2024 (.internal).
_LOCAL_SUFFIXES = frozenset(
    {
        "alt", "corp", "example", "home", "internal", "intranet", "invalid", "lan", "local",
        "localdomain", "localhost", "onion", "private", "test",
    }
)  # fmt: skip


class HostError(ValueError):
    """A spelling that is no host. `explanation` is one sentence for the person or the agent."""

    def __init__(self, explanation: str) -> None:
        """Keep the sentence; the reason word is always `host-invalid`."""
        super().__init__(explanation)
        self.explanation = explanation


class Host(NamedTuple):
    """A host in its one canonical spelling; `address` is set when it is an address literal."""

    text: str
    address: Address | None = None

    def authority(self, port: int) -> str:
        """Return `host:port`, IPv6 in brackets."""
        return f"[{self.text}]:{port}" if ":" in self.text else f"{self.text}:{port}"


def parse_host(text: str) -> Host:
    """Return the canonical host, with IPv6 taken with or without brackets.

    Raises:
        HostError: for everything that is neither a plain name nor an address.
    """
    _refuse_strange(text)
    if text.startswith("["):
        if not text.endswith("]"):
            raise HostError("the bracket of an IPv6 address is not closed")
        return _ipv6(text[1:-1])
    if ":" in text:
        return _ipv6(text)
    name = text.lower().removesuffix(".")
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        address = _inet_aton(labels)
        return Host(str(address), address)
    if len(name) > _MAX_NAME or not all(_LABEL.fullmatch(label) for label in labels):
        raise HostError("a host name is made of labels of letters, digits, '-' and '_', joined by single dots")
    return Host(name)


def parse_authority(text: str, default_port: int | None = None) -> tuple[Host, int]:
    """Split `host:port` (RFC 3986, section 3.2, without user information).

    Raises:
        HostError: also when the port is absent and there is no default, or is not 1 to 65535.
    """
    _refuse_strange(text)
    head, colon, tail = text.rpartition(":")
    if not colon or tail.endswith("]"):
        head, tail = text, ""
        if default_port is None:
            raise HostError("the port is missing")
    elif not _PORT.fullmatch(tail) or int(tail) > _MAX_PORT:
        raise HostError("the port is not a number from 1 to 65535")
    if ":" in head and not head.startswith("["):
        raise HostError("an IPv6 address with a port needs brackets")
    return parse_host(head), int(tail) if tail else default_port or 0


def is_reserved(name: str) -> bool:
    """Say whether a canonical name belongs to the proxy itself."""
    return name == PROXY_NAME or name.endswith("." + PROXY_NAME)


def is_public_name(name: str) -> bool:
    """Say whether a canonical name could be found in the public DNS.

    Single labels and special-use names are answered by the local network (hosts file, search
    domains, mDNS, LLMNR), so open modes do not hand them to the resolver.
    """
    labels = name.split(".")
    return len(labels) > 1 and labels[-1] not in _LOCAL_SUFFIXES and labels[-2:] != ["home", "arpa"]


def unmap(address: Address) -> Address:
    """Return the IPv4 address inside a v4-mapped one (`::ffff:0:0/96`), any other unchanged."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def parse_address(text: str) -> Address | None:
    """Return the address a resolver gave, its zone id cut off, or None when it is none."""
    try:
        host = parse_host(text.split("%", 1)[0])
    except HostError:
        return None
    return host.address


def _refuse_strange(text: str) -> None:
    """Refuse what is in no host, naming the trick where it has a name."""
    if not 0 < len(text) <= _MAX_TEXT:
        raise HostError("the host is empty" if not text else "the host is too long")
    if "\0" in text:
        raise HostError("the host contains a NUL character")
    if not text.isascii():
        raise HostError("the host is not ASCII; write an international name in its xn-- form")
    if not text.isprintable() or " " in text:
        raise HostError("the host contains white space or control characters")
    if "@" in text:
        raise HostError("user information before the host is not accepted")
    if "%" in text:
        raise HostError("percent-encoding and zone ids are not accepted in a host")


def _ipv6(text: str) -> Host:
    """Read an IPv6 address; a v4-mapped one is the IPv4 address it stands for."""
    try:
        address = unmap(IPv6Address(text))
    except ValueError:
        raise HostError("this is not an IPv6 address") from None
    return Host(str(address), address)


def _inet_aton(parts: list[str]) -> IPv4Address:
    """Read one to four numbers as inet_aton(3) does: octal, hex, and a last part that fills the rest."""
    if len(parts) > 4 or not all(_NUMBER.fullmatch(part) for part in parts):  # noqa: PLR2004 - four bytes
        raise HostError("a host that ends in a number must be an IPv4 address")
    try:
        numbers = [_number(part) for part in parts]
    except ValueError:
        raise HostError("this is not an IPv4 address") from None
    *leading, last = numbers
    room = 8 * (4 - len(leading))
    if last >= 1 << room or any(number > 255 for number in leading):  # noqa: PLR2004 - one byte
        raise HostError("this is not an IPv4 address")
    value = last
    for index, number in enumerate(leading):
        value |= number << (24 - 8 * index)
    return IPv4Address(value)


def _number(text: str) -> int:
    """Read one part of a dotted address: `0x` hex, leading zero octal, else decimal."""
    if text.startswith("0x"):
        return int(text.removeprefix("0x"), 16)
    return int(text, 8) if text.startswith("0") else int(text)
