"""Renewing a login: the one place that sends a refresh token, one process at a time.

A rotating refresh token works once, so the order is: hold the lock, look again (another process may have
renewed meanwhile), write the intention, ask, write the answer, and only then use it. Killed in between,
the intention tells the next one that the refresh token may be used up. Blocks; `logins` calls it in a
thread. What an answer means is decided in `credentials`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from cloister.credentials import logins as kept_logins
from cloister.credentials import oauth
from cloister.credentials.logins import Kept
from cloister.credentials.oauth_answers import AnswerError, Granted, read_token_answer
from cloister.egress.hosts import parse_host
from cloister.errors import CloisterError, DeniedError, RetryError, StepError
from cloister.host.logins import Held, Shelf
from cloister.host.token_endpoint import Answer, Proxy, UnreachableError, post
from cloister.runs.login_files import understood
from cloister.runs.upstream import upstream_proxy

Post = Callable[[oauth.Request], Answer]
Clock = Callable[[], float]


class RenewalError(Exception):
    """A renewal failed. `error` is what people are told; `retry_after_s` what the provider asked for, or 0."""

    def __init__(self, error: CloisterError, retry_after_s: float = 0.0) -> None:
        """Keep both."""
        super().__init__(error.reference)
        self.error = error
        self.retry_after_s = retry_after_s


def poster(environment: Mapping[str, str]) -> Post:
    """Return what sends requests to providers, through the proxy that an environment names (`https_proxy`, `no_proxy`).

    Raises, when called: `UnreachableError`, and `UnsupportedError` for a proxy of a kind that is not known.
    """

    def send(request: oauth.Request) -> Answer:
        return post(request.url, request.content_type, request.body, proxy=_proxy_for(request.url, environment))

    return send


def _proxy_for(url: str, environment: Mapping[str, str]) -> Proxy | None:
    parts = urlsplit(url)
    found = upstream_proxy("env", environment) if parts.scheme == "https" else None
    if found is None or found.direct.covers(parse_host(parts.hostname or ""), parts.port or 443):
        return None
    return Proxy(found.host, found.port, found.authorization)


class Renewals:
    """Renews the logins of one directory."""

    def __init__(self, shelf: Shelf, send: Post, now: Clock = time.time) -> None:
        """Use a store, a way to providers, and a clock that tells seconds since the epoch."""
        self._shelf = shelf
        self._send = send
        self._now = now
        self._unwritten: dict[str, Kept] = {}

    def renew(self, name: str, replacing: str, *, forced: bool = False) -> Kept:
        """Return the login with another access token than the one that was found wanting.

        Args:
            name: which login.
            replacing: the access token that is due, expired or was refused. When another one is stored by now, that
                one is returned and nothing is asked.
            forced: whether a host answered 401 to it.

        Raises:
            RenewalError: it could not be renewed.
            CloisterError: the store is at fault.
        """
        with self._shelf.held(name) as held:
            kept = self._current(held, name)
            if kept.ended:
                raise RenewalError(expired(kept))
            if kept.access_token != replacing or (forced and not kept_logins.may_force(kept, self._now())):
                return kept
            if not kept.refresh_token:
                raise RenewalError(expired(kept, "no-refresh-token"))
            return self._ask(held, kept, forced=forced)

    def _current(self, held: Held, name: str) -> Kept:
        """Return what is stored, after an answer was stored that could not be written when it came."""
        kept = understood(held.read(), name)
        waiting = self._unwritten.get(name)
        if waiting is not None and (kept.renewing is None or kept.made != waiting.made):
            waiting = None  # somebody has logged in anew, or renewed
        if waiting is not None:
            held.write(kept_logins.encode(waiting))
            kept = waiting
        self._unwritten.pop(name, None)
        return kept

    def _ask(self, held: Held, kept: Kept, *, forced: bool) -> Kept:
        interrupted = kept.renewing is not None
        before = kept if interrupted else kept_logins.begun(kept, self._now())
        held.write(kept_logins.encode(before))
        try:
            granted = self._granted(kept)
        except UnreachableError as error:
            held.write(kept_logins.encode(kept))
            raise RenewalError(_unreachable(kept, error.reason)) from None
        except AnswerError as error:
            over = kept_logins.ended(kept, error.code) if error.kind == "ended" else kept
            held.write(kept_logins.encode(over))
            raise RenewalError(_refused(over, error, interrupted=interrupted), error.retry_after_s) from None
        fresh = kept_logins.renewed(kept, granted, self._now(), forced=forced)
        try:
            held.write(kept_logins.encode(fresh))
        except StepError:
            self._unwritten[kept.name] = fresh
            raise
        return fresh

    def _granted(self, kept: Kept) -> Granted:
        answer = self._send(oauth.refresh_request(kept.login, kept.refresh_token, kept.scopes))
        return read_token_answer(answer.status, answer.body, self._now(), retry_after_s=answer.retry_after_s)


def expired(kept: Kept, code: str = "", why: str = "") -> CloisterError:
    """Return the error for a login that only a new one replaces."""
    code = code or kept.ended
    message = f"the login {kept.name!r} has ended ({code}){why}"
    return DeniedError("login-expired", message, where=_host(kept), remedy=f"cloister login {kept.name}")


def _refused(kept: Kept, error: AnswerError, *, interrupted: bool) -> CloisterError:
    if error.kind == "ended":
        why = "; a renewal had been broken off, and its refresh token works only once" if interrupted else ""
        return expired(kept, why=why)
    if error.kind == "later":
        return RetryError(
            "login-not-renewed",
            f"the provider of the login {kept.name!r} is in trouble ({error.code})",
            where=_host(kept),
        )
    message = f"the provider refused to renew the login {kept.name!r} ({error.code})"
    return DeniedError("login-refused", message, where=_host(kept), remedy=f"cloister login {kept.name}")


def _unreachable(kept: Kept, reason: str) -> CloisterError:
    message = f"the provider of the login {kept.name!r} gave no answer ({reason})"
    return RetryError("login-not-renewed", message, where=_host(kept))


def _host(kept: Kept) -> str:
    return kept.login.token_url
