"""What one run may use: which request gets which secret, what is refused, and what a policy reload takes back."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

from cloister.egress.decision import Target
from cloister.egress.events import EgressEvent
from cloister.egress.hosts import parse_host
from cloister.errors import CloisterError, RetryError
from cloister.policy.model import Credential, Injection
from cloister.relay.leaks import Watch
from cloister.relay.session import RefusedError, Swap
from cloister.runs.authority import Trusted
from cloister.runs.credentials import RunCredentials

T = TypeVar("T")
HOST = "api.example.org"


def run(job: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that waits for nothing outside, without a loop that touches the machine."""
    try:
        job.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    raise AssertionError("it waited")


class Reader:
    """Gives secrets from a table, in place of `SecretReader`."""

    def __init__(self, **values: bytes) -> None:
        self.values = {f"pass:{name}": value for name, value in values.items()}
        self.refused_ones: list[str] = []
        self.forgotten = False

    async def read(self, reference: str) -> bytes:
        """Return it, or fail as the real one does."""
        if reference not in self.values:
            raise RetryError("secret-unavailable", "a secret cannot be had: detail", where=reference)
        return self.values[reference]

    def refused(self, reference: str) -> None:
        """Note it."""
        self.refused_ones.append(reference)

    def forget(self) -> None:
        """Note it."""
        self.forgotten = True


def one(name: str, *, env: str = "", mask: bool = False, **inject: Any) -> Credential:
    """Return a credential."""
    keys = {"host": HOST, "scheme": "bearer", **inject}
    return Credential(secret=f"pass:{name}", env=env, mask=mask, inject=Injection(**keys))


def credentials(reader: Reader | None = None, **named: Credential) -> RunCredentials:
    """Return the credentials of a run."""
    trusted = Trusted(None, b"")  # type: ignore[arg-type]  # no certificate is asked for here
    return RunCredentials(named, reader or Reader(**dict.fromkeys(named, b"real-secret")), trusted)  # type: ignore[arg-type]


def target(method: str = "GET", path: str = "/x", host: str = HOST, port: int = 443) -> Target:
    """Return a request's target."""
    return Target("https", parse_host(host), port, method, path)


def swap(held: RunCredentials, *headers: tuple[bytes, bytes], at: Target | None = None) -> Swap:
    """Swap a request."""
    return run(held.swap(at or target(), [(b"host", b"api.example.org"), *headers]))


def refusal(held: RunCredentials, *headers: tuple[bytes, bytes], at: Target | None = None) -> str:
    """Return why a request is refused."""
    with pytest.raises(RefusedError) as caught:
        swap(held, *headers, at=at)
    assert "real-secret" not in f"{caught.value!r} {caught.value.verdict!r}"
    return caught.value.verdict.reason


def bearer(held: RunCredentials, name: str) -> tuple[bytes, bytes]:
    """Return the field with a placeholder."""
    return (b"authorization", b"Bearer " + held.placeholders[name].token.encode())


REAL = (b"authorization", b"Bearer real-secret")


def test_only_bound_places_are_terminated() -> None:
    """Host and port must be bound; a name below or beside is none."""
    held = credentials(a=one("a", host=(HOST, "b.example.org"), port=8443))

    assert held.terminates(HOST, 8443)
    assert held.terminates("b.example.org", 8443)
    assert not held.terminates(HOST, 443)
    assert not held.terminates("x.api.example.org", 8443)
    assert not credentials(a=Credential(secret="pass:a")).terminates(HOST, 443)


def test_a_placeholder_becomes_the_secret_at_its_host_only() -> None:
    """At the bound place it is swapped and named; anywhere else it stays what it is, and is known as a leak."""
    held = credentials(a=one("a", env="A"))
    done = swap(held, bearer(held, "a"))
    other = swap(held, bearer(held, "a"), at=target(port=8443))

    assert (REAL in done.headers, done.used) == (True, ("a",))
    assert other.used == ()
    assert held.leaks(other.headers[-1][1])
    assert not held.leaks(b"".join(value for _, value in done.headers))


def test_the_environment_holds_placeholders() -> None:
    """Each variable has the placeholder of its credential; AWS has a pair; without `env` there is none."""
    held = credentials(a=one("a", env="A"), b=one("b"), c=one("c", scheme="sigv4"))

    assert held.environment.keys() == {"A", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    assert all(held.leaks(value.encode()) for value in held.environment.values())


def test_what_is_put_in_unasked() -> None:
    """Without a variable, and for git, npm and pip; not beside a value of the client's own, and one per place."""
    held = credentials(a=one("a"), b=one("b", scheme="git"), c=one("c", env="C"))
    own = (b"authorization", b"Bearer mine")

    assert swap(held).used == ("a",)
    assert swap(held, own).used == ()
    assert own in swap(held, own).headers
    assert swap(held, bearer(held, "c")).used == ("c",)
    assert swap(credentials(c=one("c", env="C"))).used == ()


def test_two_places_of_one_request() -> None:
    """A header and a parameter may both be filled by their own credentials."""
    held = credentials(a=one("a"), b=one("b", scheme="query", query="key"))
    done = swap(held)

    assert (done.used, done.path) == (("a", "b"), "/x?key=real-secret")


@pytest.mark.parametrize(
    ("method", "path", "good"),
    [
        ("GET", "/repos/x", True),
        ("GET", "/repos/x?y=/user", True),
        ("POST", "/repos/x", False),
        ("GET", "/user", False),
        ("GET", "/repos/../user", False),
        ("GET", "/repos/%2e%2e/user", False),
        ("GET", "//repos/x", False),
        ("TRACE", "/repos/x", False),
    ],
)
def test_limits(method: str, path: str, good: bool) -> None:
    """Methods and paths bind the secret: others are refused with it, and go without it when it was not asked for."""
    limits = {"methods": ("GET", "TRACE"), "paths": ("/repos/**",)}
    asked, unasked = credentials(a=one("a", env="A", **limits)), credentials(a=one("a", **limits))
    at = target(method, path)

    if good:
        assert swap(asked, bearer(asked, "a"), at=at).used == swap(unasked, at=at).used == ("a",)
    else:
        assert refusal(asked, bearer(asked, "a"), at=at) == "credential-not-for-this-request"
        assert swap(unasked, at=at).used == ()


PLACE, ELSEWHERE = (HOST, 443), ("other.example.org", 443)


def test_a_body_may_hold_what_is_bound_to_its_place() -> None:
    """In a body for its own host and port a placeholder passes, and is recorded once; in a head, or elsewhere, not."""
    held = credentials(a=one("a", env="A"), b=one("b", env="B", host=ELSEWHERE[0]), c=one("c", scheme="sigv4"))
    noted: list[tuple[str, dict[str, object]]] = []
    held.record_with(lambda kind, fields: noted.append((kind, fields)))
    a, b = (b"A=" + held.placeholders[name].token.encode() for name in "ab")
    pair = f"{held.placeholders['c'].key_id} {held.placeholders['c'].token}".encode()

    assert not any(held.leaks(body, PLACE) for body in (b"nothing", a, a + a, pair, a))
    assert not held.leaks(b, ELSEWHERE)
    assert held.leaks(a)
    assert all(held.leaks(a, place) for place in (ELSEWHERE, (HOST, 80), (HOST, 8443), ("x." + HOST, 443)))
    assert all(held.leaks(body, PLACE) for body in (b, a + b, pair + b))
    assert [(kind, fields["name"]) for kind, fields in noted] == [
        ("placeholder-in-body", name) for name in ("a", "c", "b")
    ]
    assert noted[0][1]["place"] == f"{HOST}:443"
    assert not any(held.placeholders[name].token in str(noted) for name in "abc")


def test_what_is_taken_back_may_stand_in_no_body() -> None:
    """Bound to another host now, or to none: a stranger where it was at home. Put back, it passes again."""
    held = credentials(a=one("a", env="A"), b=one("b", env="B"))
    body = held.placeholders["a"].token.encode()
    assert not held.leaks(body, PLACE)
    held.update({"b": one("b", env="B")})
    assert held.leaks(body, PLACE)
    held.update({"a": one("a", env="A"), "b": one("b", env="B")})
    assert not held.leaks(body, PLACE)


def spelled(token: str) -> tuple[bytes, ...]:
    """Return a placeholder as tools would send it."""
    everywhere = "".join(f"%{byte:02X}" for byte in token.encode())
    return token.encode(), base64.b64encode(b"u:" + token.encode()), everywhere.encode()


@pytest.mark.parametrize("kind", range(3), ids=["plain", "base64", "percent"])
@pytest.mark.parametrize("name", ["a", "b", "both"])
def test_no_cut_of_a_body_changes_what_is_said(kind: int, name: str) -> None:
    """Cut in two at every byte, a body with its own placeholder arrives whole; one with a stranger's never does."""
    held = credentials(a=one("a", env="A"), b=one("b", env="B", host=ELSEWHERE[0]))
    tokens = [spelled(held.placeholders[one_].token)[kind] for one_ in ("ab" if name == "both" else name)]
    body = b"x" * 150 + b" ".join(tokens) + b"y" * 150
    for cut in range(len(body) + 1):
        watch = Watch(held, PLACE)
        passed = watch.feed(body[:cut]) + watch.feed(body[cut:]) + watch.flush()
        assert watch.broken == (name != "a"), cut
        assert watch.broken or passed == body, cut
        assert name == "a" or tokens[-1] not in passed


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_body_byte_by_byte(name: str) -> None:
    """One at a time, slower than any hold, it is the same: the last byte of a stranger's never leaves."""
    held = credentials(a=one("a", env="A"), b=one("b", env="B", host=ELSEWHERE[0]))
    body = b"--" + held.placeholders[name].token.encode() + b"--"
    watch, passed = Watch(held, PLACE), b""
    for byte in body:
        passed += watch.feed(bytes([byte]))
        passed += b"" if watch.broken else watch.flush()

    assert passed == (body if name == "a" else body[:-3])


def test_masks_are_asked_for() -> None:
    """With `mask` the swap names what must not be echoed; without it nothing."""
    held = credentials(a=one("a", mask=True), b=one("b", scheme="query", query="k"))

    assert swap(held).masks == (b"real-secret",)


def test_an_unavailable_secret_is_refused_and_its_reason_kept_outside() -> None:
    """The agent learns that it is so; the log of the run also why. Nothing leaves without the secret."""
    held = credentials(Reader(), a=one("a", env="A"))
    noted: list[tuple[str, dict[str, object]]] = []
    held.record_with(lambda kind, fields: noted.append((kind, fields)))
    with pytest.raises(RefusedError) as caught:
        swap(held, bearer(held, "a"))

    assert caught.value.verdict.reason == "secret-unavailable"
    assert "detail" not in caught.value.verdict.explanation
    assert "detail" in str(noted[0][1]["why"])
    with pytest.raises(CloisterError):
        run(held.check())


@pytest.mark.parametrize(("scheme", "secret"), [("bearer", b"a\r\nx: y"), ("sigv4", b"no pair"), ("git", b"")])
def test_a_secret_that_cannot_stand_there_refuses_the_start(scheme: str, secret: bytes) -> None:
    """A line break in a header, no key pair for AWS: found before the run, not by its first request."""
    held = credentials(Reader(a=secret), a=one("a", scheme=scheme))
    with pytest.raises(CloisterError) as caught:
        run(held.check())

    assert caught.value.reference == "secret-unusable"
    assert caught.value.where == "pass:a"
    run(credentials(Reader(a=b"id:key"), a=one("a", scheme=scheme)).check())


def test_what_is_taken_back_fails_and_says_so() -> None:
    """Removed, or bound to another host: `update` names it, its placeholder is refused, and it is not put in."""
    held = credentials(a=one("a", env="A"), b=one("b", scheme="query", query="k"))

    assert held.update({"a": one("a", env="A"), "b": one("b", scheme="query", query="k")}) == ()
    assert held.update({"b": one("b", scheme="query", query="k", host="other.example.org")}) == ("a", "b")
    assert refusal(held, bearer(held, "a")) == "credential-revoked"
    assert refusal(held, at=target(path="/?x=" + held.placeholders["a"].token)) == "credential-revoked"
    assert swap(held).used == ()
    assert swap(held, at=target(host="other.example.org")).used == ("b",)
    assert held.terminates(HOST, 443)
    assert held.update({"a": one("a", env="A")}) == ("b",)
    assert swap(held, bearer(held, "a")).used == ("a",)


def test_a_credential_added_later_is_not_the_runs() -> None:
    """The environment of a living run is fixed, so a reload adds nothing to it."""
    held = credentials(a=one("a", env="A"))
    held.update({"a": one("a", env="A"), "new": one("new", host="new.example.org")})

    assert not held.terminates("new.example.org", 443)
    assert swap(held, at=target(host="new.example.org")).used == ()


def test_without_an_authority_nothing_is_bound() -> None:
    """A run whose policy injected nothing at its start has no bundle, so a reload cannot end TLS for it."""
    held = RunCredentials({"a": Credential(secret="pass:a")}, Reader(), None)  # type: ignore[arg-type]
    held.update({"a": one("a")})

    assert not held.terminates(HOST, 443)


def test_after_the_run_nothing_works() -> None:
    """Closed, every request is refused, and what was read is forgotten."""
    reader = Reader(a=b"real-secret")
    held = credentials(reader, a=one("a", env="A"))
    held.close()

    assert refusal(held, bearer(held, "a")) == "run-ended"
    assert reader.forgotten


def test_uses_are_counted_and_a_401_has_it_asked_anew() -> None:
    """Each request counts once per place; only 401 of a request that carried the secret is about the secret."""
    reader = Reader(a=b"real-secret")
    held = credentials(reader, a=one("a", env="A"), b=one("b", env="B"))
    for status, names in ((200, ("a",)), (401, ("a",)), (401, ()), (403, ("a",))):
        held.note(EgressEvent(0.0, "https", HOST, 443, "allow", "allowed-by-rule", status=status, credentials=names))

    assert held.summary() == ("a: 3 requests to api.example.org:443", "b: not used")
    assert reader.refused_ones == ["pass:a"]


def test_bodies_are_wanted_for_signatures_only() -> None:
    """A body is collected only where our pair signed and its hash is not said."""
    held = credentials(a=one("a", env="A"), s=one("s", scheme="sigv4"))
    pair = held.placeholders["s"]
    mine = (b"authorization", f"AWS4-HMAC-SHA256 Credential={pair.key_id}/20260101/r/sts/aws4_request".encode())

    assert held.body_needed(target("POST"), [mine]) == 16 << 20
    assert held.body_needed(target("POST"), [mine, (b"x-amz-content-sha256", b"UNSIGNED-PAYLOAD")]) == 0
    assert held.body_needed(target("POST"), [bearer(held, "a")]) == 0
    assert held.body_needed(target("POST", host="other.example.org"), [mine]) == 0


def test_nothing_prints_a_secret() -> None:
    """The object shows no parts, and an error's chain holds nothing."""
    held = credentials(a=one("a", env="A"))
    assert "cloister-a" not in repr(held)
    assert asyncio.iscoroutinefunction(held.swap)
