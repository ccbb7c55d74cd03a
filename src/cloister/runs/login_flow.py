"""Logging in and out: the conversations between the person, a browser and the provider.

Outside every sandbox, in the process of the command line: the broker only finds the result in the store.
Until the provider has answered with tokens nothing is written, so breaking off leaves nothing.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NoReturn

from cloister.credentials import logins as kept_logins
from cloister.credentials import oauth
from cloister.credentials.logins import Kept
from cloister.credentials.oauth_answers import (
    AnswerError,
    DeviceCode,
    Granted,
    read_device_answer,
    read_revoke_answer,
    read_token_answer,
)
from cloister.credentials.products import read_product
from cloister.errors import CloisterError, DeniedError, RetryError, UsageError
from cloister.host.logins import MAX_BYTES, Shelf
from cloister.host.redirects import Redirected, Redirects, Typed
from cloister.host.token_endpoint import UnreachableError
from cloister.policy.login import Login
from cloister.policy.model import Preset
from cloister.runs.login_files import load
from cloister.runs.login_renewal import Post

PATIENCE_S = 600.0
"""How long a person may take in the browser."""
_POLL_SLOWER_S = 5.0  # RFC 8628 section 3.5


@dataclass(frozen=True, slots=True)
class Person:
    """How the person is talked to."""

    tell: Callable[[str], None]
    """Shows a text."""
    open: Callable[[str], bool]
    """Opens an address in a browser; says whether there is one."""
    terminal: int = -1
    """A descriptor that lines can be typed into, or -1."""


def provider_for(name: str, preset: str, presets: Mapping[str, Preset], shelf: Shelf) -> tuple[str, Login]:
    """Return which preset a login belongs to, and its provider.

    Args:
        name: of the login.
        preset: named by the person, or nothing: then that of the login of this name, else the one called so.
        presets: all there are.
        shelf: the store.

    Raises:
        UsageError: `login-no-provider`, with the presets that have one.
    """
    if not preset:
        try:
            kept = load(shelf, name)
        except CloisterError:  # no such login, or a broken one that is to be replaced
            preset = name
        else:
            preset = kept.preset
            if preset not in presets:
                return preset, kept.login
    found = presets.get(preset)
    if found is None or found.login is None:
        known = ", ".join(sorted(one for one, value in presets.items() if value.login))
        raise UsageError(
            "login-no-provider",
            f"no preset {preset!r} says how to log in (those that do: {known})",
            remedy="cloister login NAME --preset PRESET, or add [login] to a preset of your own",
        )
    return preset, found.login


def by_browser(login: Login, person: Person, send: Post, chance: Callable[[int], bytes] = os.urandom) -> Granted:
    """Log in by a browser: on this machine, or on another one whose last address is pasted.

    Raises:
        CloisterError: nobody agreed in time, the provider refused, or every port is taken.
    """
    _need(login.authorize_url, "authorize_url", "cloister login NAME --device")
    attempt = oauth.begin(chance(oauth.CHANCE_BYTES))
    with Redirects(login.redirect) as redirects:
        address = oauth.authorize_url(login, attempt, redirects.redirect_uri)
        person.tell(f"Log in at this address:\n\n  {address}\n")
        if person.open(redirects.start_at(chance(16).hex(), address)):
            person.tell("A browser was asked to open it.")
        if person.terminal >= 0:
            person.tell("If the browser is on another machine, paste the address of its last page here.")
        for event in redirects.events(PATIENCE_S, person.terminal):
            code = _code_of(event, attempt, person)
            if code:
                return _exchanged(login, attempt, redirects.redirect_uri, code, send)
    raise RetryError("login-not-completed", "nobody logged in within 10 minutes")


def by_paste(
    login: Login, person: Person, read: Callable[[], str], send: Post, chance: Callable[[int], bytes] = os.urandom
) -> Granted:
    """Log in by a page of the provider that shows a code, which `read` then asks for.

    Raises:
        CloisterError: as `by_browser`.
    """
    _need(login.paste_redirect, "paste_redirect", "cloister login NAME, and paste the last address of the browser")
    attempt = oauth.begin(chance(oauth.CHANCE_BYTES))
    address = oauth.authorize_url(login, attempt, login.paste_redirect)
    person.tell(f"Log in at this address, and paste the code that its last page shows:\n\n  {address}\n")
    while line := read():
        code = _code_of(Typed(line), attempt, person)
        if code:
            return _exchanged(login, attempt, login.paste_redirect, code, send)
    raise RetryError("login-not-completed", "no code was given")


def by_device(
    login: Login, person: Person, send: Post,
    sleep: Callable[[float], None] = time.sleep, monotonic: Callable[[], float] = time.monotonic,
) -> Granted:  # fmt: skip
    """Log in with a code that is typed at the provider's page, on any device (RFC 8628).

    Raises:
        CloisterError: as `by_browser`.
    """
    _need(login.device_url, "device_url", "cloister login NAME")
    device = _device(login, send)
    shown = f"Open {device.address} and enter the code {device.user_code}"
    person.tell(shown + (f",\nor open {device.complete_address}" if device.complete_address else ""))
    interval_s, end = device.interval_s, monotonic() + device.lifetime_s
    while monotonic() + interval_s < end:
        sleep(interval_s)
        try:
            answer = send(oauth.poll_request(login, device))
            return read_token_answer(answer.status, answer.body, time.time())
        except UnreachableError:
            interval_s = min(interval_s * 2, 60.0)  # RFC 8628 section 3.5: back off after a timeout
        except AnswerError as error:
            if error.kind == "slow-down":
                interval_s += _POLL_SLOWER_S
            elif error.kind not in ("pending", "later"):
                _fail(login, error)
    raise RetryError("login-not-completed", "nobody entered the code in time")


def from_product(login: Login, home: str, uid: int) -> tuple[Granted, str]:
    """Take over the login that the product itself has made; return it, and the file it stands in.

    Raises:
        UsageError: `login-no-product`, where none is known, none is logged in, or the file is not the person's.
    """
    path = f"{home}/{login.product_file}"
    if not login.product:
        raise _no_product("this provider has no product whose login file is known", "")
    try:
        with open(path, "rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode) or info.st_uid != uid:
                raise _no_product("the product's login file is not a file of yours", path)
            data = file.read(MAX_BYTES)
    except OSError as error:
        raise _no_product(f"the product's login file cannot be read: {error.strerror}", path) from error
    try:
        return read_product(login.product, data, time.time()), path
    except AnswerError as error:
        raise _no_product(f"the product has no login to hand over ({error.code})", path) from None


def keep(shelf: Shelf, name: str, preset: str, login: Login, granted: Granted) -> Kept:
    """Store a login, in the place of one of the same name.

    Raises:
        CloisterError: it cannot be stored.
    """
    kept = kept_logins.new(name, preset, login, granted, time.time())
    with shelf.held(name) as held:
        held.write(kept_logins.encode(kept))
    return kept


def log_out(shelf: Shelf, name: str, send: Post | None) -> Literal["revoked", "forgotten"]:
    """Revoke a login where its provider can, and forget it in any case; runs that use it fail at their next request.

    Args:
        shelf: the store.
        name: which login.
        send: the way to providers; None leaves the provider alone.

    Raises:
        UsageError: there is none of that name.
        CloisterError: the store is at fault.
    """
    shelf.stamp(name)  # a name that is none is refused before anything is made
    with shelf.held(name) as held:
        try:
            kept: Kept | None = load(shelf, name)
        except UsageError:
            raise
        except CloisterError:  # broken, or open to others: it goes all the same
            kept = None
        revoked = kept is not None and send is not None and _revoked(kept, send)
        held.remove()
    return "revoked" if revoked else "forgotten"


def _code_of(event: Redirected | Typed, attempt: oauth.Attempt, person: Person) -> str:
    """Return the code that an event brings, or nothing when it belongs to no login of ours."""
    try:
        if isinstance(event, Typed):
            return oauth.read_pasted(event.line, attempt)
        code = oauth.read_callback(event.query, attempt)
    except (oauth.WrongStateError, ValueError):
        if isinstance(event, Typed):
            person.tell("That is not the address or the code of this login; it has a state that belongs to it.")
        else:
            event.answer(400, "This does not belong to the login that is under way. Nothing was changed.")
        return ""
    except AnswerError as error:
        if isinstance(event, Redirected):
            event.answer(200, "The login was refused. You can close this page.")
        raise DeniedError("login-refused", f"the provider refused the login ({error.code})") from None
    event.answer(200, "You are logged in, and can close this page.")
    return code


def _exchanged(login: Login, attempt: oauth.Attempt, redirect_uri: str, code: str, send: Post) -> Granted:
    try:
        answer = send(oauth.exchange_request(login, attempt, redirect_uri, code))
        return read_token_answer(answer.status, answer.body, time.time())
    except UnreachableError as error:
        raise _unreachable(login.token_url, error) from None
    except AnswerError as error:
        _fail(login, error)


def _device(login: Login, send: Post) -> DeviceCode:
    try:
        answer = send(oauth.device_request(login))
        return read_device_answer(answer.status, answer.body)
    except UnreachableError as error:
        raise _unreachable(login.device_url, error) from None
    except AnswerError as error:
        _fail(login, error)


def _revoked(kept: Kept, send: Post) -> bool:
    token = kept.refresh_token or kept.access_token
    if not kept.login.revoke_url or not token:
        return False
    hint: Literal["refresh_token", "access_token"] = "refresh_token" if kept.refresh_token else "access_token"
    try:
        answer = send(oauth.revoke_request(kept.login, token, hint))
        read_revoke_answer(answer.status, answer.body)
    except (UnreachableError, AnswerError):
        return False
    return True


def _need(value: str, key: str, instead: str) -> None:
    if not value:
        message = f"the provider has no {key}, so this way of logging in does not work with it"
        raise UsageError("login-no-provider", message, remedy=instead)


def _fail(login: Login, error: AnswerError) -> NoReturn:
    message = f"the provider refused the login ({error.code})"
    raise DeniedError("login-refused", message, where=login.token_url, remedy="log in again") from None


def _unreachable(url: str, error: UnreachableError) -> CloisterError:
    return RetryError("login-not-completed", f"the provider gave no answer ({error.reason})", where=url)


def _no_product(why: str, path: str) -> UsageError:
    return UsageError("login-no-product", why, where=path, remedy="cloister login NAME, without --from-product")
