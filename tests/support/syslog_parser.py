r"""A strict parser of RFC 5424, written from its grammar (section 6), and of octet-counted frames (RFC 6587, 3.4.1)."""

from __future__ import annotations

import re

_HEADER = re.compile(
    rb"<(0|[1-9][0-9]{0,2})>1 "
    rb"(-|[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,6})?(?:Z|[+-][0-9]{2}:[0-9]{2}))"
    rb" ([!-~]{1,255}) ([!-~]{1,48}) ([!-~]{1,128}) ([!-~]{1,32}) "
)
_NAME = re.compile(rb"[!#-<>-\\^-~]{1,32}")


class SyslogError(ValueError):
    """It is not a message of RFC 5424."""


def parse(message):
    """Return (priority, (timestamp, host, app, process id, message id), {element: {name: value}}, text)."""
    found = _HEADER.match(message)
    if not found or int(found[1]) > 191:
        raise SyslogError(f"header: {message[:120]!r}")
    data, at = {}, found.end()
    if message[at : at + 1] == b"-":
        at += 1
    while message[at : at + 1] == b"[":
        at = _element(message, at + 1, data)
    if message[at : at + 1] not in (b" ", b""):
        raise SyslogError("no space after the structured data")
    return int(found[1]), tuple(part.decode() for part in found.groups()[1:]), data, message[at + 1 :]


def _element(message, at, data):
    name = _NAME.match(message, at)
    if not name:
        raise SyslogError("SD-NAME")
    values = data.setdefault(name[0].decode(), {})
    at = name.end()
    while message[at : at + 1] == b" ":
        key = _NAME.match(message, at + 1)
        if not key or message[key.end() : key.end() + 2] != b'="':
            raise SyslogError("SD-PARAM")
        value, at = _quoted(message, key.end() + 2)
        values[key[0].decode()] = value
    if message[at : at + 1] != b"]":
        raise SyslogError("an element without its end")
    return at + 1


def _quoted(message, at):
    value = bytearray()
    while True:
        sign = message[at : at + 1]
        if sign == b"\\" and message[at + 1 : at + 2] in (b'"', b"\\", b"]"):
            value += message[at + 1 : at + 2]
            at += 2
        elif sign == b'"':
            return value.decode(), at + 1
        elif sign in (b"]", b""):
            raise SyslogError("a sign that must be escaped")
        else:
            value += sign
            at += 1


def frames(stream):
    """Return the messages of octet-counted frames, and what is left of the last one."""
    found = []
    while match := re.match(rb"([1-9][0-9]{0,6}) ", stream):
        end = match.end() + int(match[1])
        if len(stream) < end:
            break
        found.append(stream[match.end() : end])
        stream = stream[end:]
    return found, stream
