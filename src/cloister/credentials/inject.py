"""Putting a secret where it belongs in a request, and nowhere else. One door for all schemes.

A secret is put in at the place its policy names, in the form its policy names, whatever the
client wrote around the placeholder: a placeholder in a body, another field or another
parameter is not replaced, since a host that shows what it was sent would give the secret
away. `find` says what the client sent at that place; `put` returns the request that leaves.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, assert_never

from cloister.credentials import authorization, query, segment, sigv4
from cloister.credentials.bindings import Binding, Request
from cloister.credentials.placeholders import Placeholder

Found = Literal["placeholder", "absent", "own"]
"""What stands at the credential's place: our placeholder, nothing, or a value of the client's own."""


def find(binding: Binding, placeholder: Placeholder, request: Request) -> Found:
    """Return what the client sent where this credential goes."""
    match binding.scheme:
        case "query":
            values = query.values(request.path, binding.query)
        case "path":
            values = segment.values(request.path, binding.value)
        case "sigv4":
            values = sigv4.signatures(request)
        case "header" | "bearer" | "basic" | "git" | "npm" | "pip":
            values = authorization.values(binding, request.headers)
        case _:
            assert_never(binding.scheme)
    if not values:
        return "absent"
    return "placeholder" if any(placeholder.stands_in(value) for value in values) else "own"


def put(binding: Binding, secret: bytes, request: Request, placeholder: Placeholder) -> Request:
    """Return the request with the secret at its place; in a path that is where the placeholder stands.

    Raises:
        InjectionError: the secret cannot stand there (line breaks, no key pair), or a signature of a kind that
            cannot be made anew.
    """
    match binding.scheme:
        case "query":
            return replace(request, path=query.put(request.path, binding.query, binding.value, secret))
        case "path":
            path = request.path
            for token in (placeholder.token, *placeholder.former):
                path = segment.put(path, binding.value, token, secret)
            return replace(request, path=path)
        case "sigv4":
            return sigv4.sign(request, sigv4.parse_keys(secret))
        case "header" | "bearer" | "basic" | "git" | "npm" | "pip":
            return replace(request, headers=authorization.put(binding, secret, request.headers))
        case _:
            assert_never(binding.scheme)


def masks(binding: Binding, secret: bytes) -> tuple[bytes, ...]:
    """Return the byte strings by which an echo of this secret would be known: itself, and as it was sent."""
    if binding.scheme == "sigv4":
        keys = sigv4.parse_keys(secret)
        return tuple(part.encode() for part in (keys.secret_key, keys.session_token) if part)
    if binding.scheme == "query":
        return tuple(dict.fromkeys((secret, query.encode(secret).encode())))
    if binding.scheme == "path":
        segment.put("", binding.value, "", secret)
        return tuple(dict.fromkeys((secret, segment.encode(secret).encode(), query.encode(secret).encode())))
    sent = authorization.put(binding, secret, [])[0][1]
    scheme, _, value = sent.partition(b" ")
    encoded = (value,) if scheme == b"Basic" else ()
    return tuple(dict.fromkeys((secret, *encoded)))
