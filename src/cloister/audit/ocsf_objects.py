"""The objects of OCSF 1.7.0 that our events have: process, file, endpoint, actor, request, model, credential.

Each function returns a plain dictionary with only the attributes that there are. What an object requires and we do
not know stands as OCSF's own *Unknown* (0) or *Other* (99). Names and numbers: schema.ocsf.io, objects/*.
"""

from __future__ import annotations

import ipaddress
import posixpath
import re
from collections.abc import Mapping

from cloister.audit.event import Endpoint, Event, File, Http, Process

Value = dict[str, object]
INTEGER_MAX = 2**31 - 1
"""OCSF `integer_t`: receivers with columns keep 32 bits."""
METHODS = ("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "POST", "PUT", "TRACE", "PATCH")
"""What `http_method` may be, in the order of activity_id of class 4002, from 1 on."""
_PORT_MAX = 65535
_SHA256 = re.compile("[0-9a-fA-F]{64}")
_SHA256_ID = 3
_DIRECTORY = 0o200000
"""O_DIRECTORY (open(2), asm-generic/fcntl.h)."""


def present(values: Mapping[str, object]) -> Value:
    """Return what is there: no None, no empty text, no empty object."""
    return {name: value for name, value in values.items() if value is not None and value not in ("", {}, [])}


def named_file(path: str, *, sha256: str = "", folder: bool = False) -> Value:
    """Return a `file`: its name is the last part of its path, and all of it where there is none."""
    hashes = (
        [{"algorithm_id": _SHA256_ID, "algorithm": "SHA-256", "value": sha256}] if _SHA256.fullmatch(sha256) else []
    )
    return present(
        {
            "name": posixpath.basename(path) or path or "?",
            "path": path,
            "parent_folder": posixpath.dirname(path),
            "type_id": 2 if folder else 0,
            "hashes": hashes,
        }
    )


def file(found: File) -> Value:
    """Return the `file` of an event."""
    return named_file(found.path, folder=bool(found.flags & _DIRECTORY))


def process(found: Process, container: Value) -> Value:
    """Return a `process`; with `container` (profile *container*) where it is one of a sandbox."""
    parent = present({"pid": found.parent_pid or None, "uid": found.parent_uid})
    return present(
        {
            "pid": integer(found.pid),
            "uid": found.uid,
            "namespace_pid": integer(found.namespace_pid) or None,
            "name": found.name,
            "path": found.path,
            "cmd_line": command_line(found.cmd_line),
            "working_directory": found.cwd,
            "user": {"uid": str(found.user_id)} if found.user_id is not None else None,
            "parent_process": parent,
            "file": named_file(found.path, sha256=found.hash) if found.path else None,
            "container": container,
        }
    )


def command_line(arguments: tuple[str, ...]) -> str:
    """Return arguments as one text, quoted as a POSIX shell would read them, so that their borders stay visible."""
    return " ".join(a if _PLAIN.fullmatch(a) else "'" + a.replace("'", "'\"'\"'") + "'" for a in arguments)


_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")


def network_endpoint(found: Endpoint) -> Value:
    """Return a `network_endpoint`; an address that is none stands as a name."""
    address = is_address(found.ip)
    named = present(
        {
            "hostname": found.hostname or ("" if address else found.ip),
            "ip": found.ip if address else "",
            "name": found.path,
        }
    )
    return {**(named or {"name": "unknown"}), **_port(found)}


def _port(found: Endpoint) -> Value:
    return {"port": found.port} if 0 < found.port <= _PORT_MAX else {}


def is_address(text: str) -> bool:
    """Whether a text is an IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def actor(event: Event, container: Value, *, with_process: bool) -> Value:
    """Return who acted: the agent as `app_name`, the person, the run as `session`, the process."""
    return present(
        {
            "app_name": event.agent,
            "app_uid": event.run,
            "user": user(event),
            "session": present({"uid": event.run}),
            "process": process(event.process, container) if with_process and event.process is not None else None,
            "invoked_by": event.source or "cloister",
        }
    )


def user(event: Event) -> Value:
    """Return the person whose run it is, and the credential that was used; empty when neither is known."""
    if not (event.user or event.account or event.credential):
        return {}
    kind = {"type_id": 1, "type": "User"} if event.user else {"type_id": 0, "type": "Unknown"}
    name = event.user or event.account or "unknown"
    return present({"name": name, **kind, "uid_alt": event.account, "credential_uid": event.credential})


def request(found: Http, endpoint: Endpoint | None) -> Value:
    """Return a `http_request`; a method that the schema does not list has no place in it."""
    host = present({"hostname": endpoint.hostname, **_port(endpoint)}) if endpoint is not None else {}
    url = present({"path": found.path, **host}) if found.path else {}
    return present({"http_method": found.method if found.method in METHODS else "", "url": url})


def integer(number: int) -> int:
    """Return a number within `integer_t`: beyond it there is only its bound."""
    return max(-INTEGER_MAX, min(number, INTEGER_MAX))
