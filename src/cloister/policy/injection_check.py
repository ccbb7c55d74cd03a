"""Whether an `inject` table may stand as it is: hosts, places, forms. A part of `check` and of `service_check`."""

from __future__ import annotations

from collections.abc import Callable

from cloister.policy import values
from cloister.policy.hosts import parse_rule
from cloister.policy.injection import Injection
from cloister.policy.model import EgressRule
from cloister.policy.scanner import Path

Add = Callable[..., None]
"""Notes a mistake: path, what is wrong, what to write instead (`document.Mistakes.add`)."""


def check_injection(add: Add, at: Path, inject: Injection) -> None:
    """Note every mistake in the table at a path."""
    _check_bound_hosts(add, at, inject)
    try:
        if inject.header:
            values.check_header(inject.header)
    except ValueError as error:
        add((*at, "header"), str(error))
    try:
        values.check_plain_value(inject.value)
    except ValueError as error:
        add((*at, "value"), str(error), "write {secret} where it goes")
    if "{secret}" not in inject.value:
        add((*at, "value"), "the value does not hold {secret}", 'value = "Bearer {secret}"')
    if not inject.value.isprintable():
        add((*at, "value"), "a header or query value has no line breaks or control characters")
    for scheme in ("header", "query"):
        if inject.scheme == scheme and not getattr(inject, scheme):
            example = {"header": 'header = "Authorization"', "query": 'query = "api_key"'}[scheme]
            add(at, f"the scheme {scheme} needs the key {scheme}", example)
    if inject.scheme == "path":
        _check_segment(add, at, inject)
    if inject.user and not (inject.user.isprintable() and ":" not in inject.user):
        add((*at, "user"), "a user name has no colon and no control characters")


def _check_segment(add: Add, at: Path, inject: Injection) -> None:
    """Refuse forms of a segment that could stand for another place, or for more than one secret."""
    if inject.value.count("{secret}") != 1 or any(sign in inject.value for sign in "/?#%\\"):
        add((*at, "value"), "a segment of a path has no slash, and the secret once", 'value = "bot{secret}"')


def _check_bound_hosts(add: Add, at: Path, inject: Injection) -> None:
    hosts = (inject.host,) if isinstance(inject.host, str) else inject.host
    if not hosts:
        add((*at, "host"), "a secret is bound to at least one host")
    for host in hosts:
        try:
            if parse_rule(host).kind != "name" or ":" in host:
                add((*at, "host"), "a secret is bound to names, not to wildcards, addresses or ports")
        except ValueError as error:
            add((*at, "host"), str(error))
    try:
        parse_rule(EgressRule(host="example.org", port=inject.port, methods=inject.methods, paths=inject.paths))
    except ValueError as error:
        add(at, str(error))
