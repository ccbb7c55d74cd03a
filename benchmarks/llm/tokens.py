"""Identity tokens: how many can be issued and verified a second, beside the bare signature."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from benchmarks.figures import interleave
from benchmarks.llm.cells import middle
from benchmarks.report import Grid, Line
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.identity.authority import OWN_AUDIENCE, Authority, Demand, Grant
from cloister.identity.state import State, with_key

COUNT, ROUNDS = 500, 7
COLUMNS = ("a second", "µs", "x signature")
SIGN, VERIFY = "Ed25519 signature alone, made", "Ed25519 signature alone, verified"
ISSUE, FRESH, KNOWN = "token issued", "token verified, never seen before", "token verified, seen before"
NOTE = """\
In process, one thread, one core. A token is a JWT with eleven claims of a run; to verify it is to check shape, key,
signature, times, audience, run and revocations. A signature that was good once is remembered for a minute, unless
something was revoked meanwhile."""


def tokens() -> list[Grid]:
    """Measure, in turn."""
    samples = {name: middle(values) for name, values in interleave(_cases(), ROUNDS).items()}
    lines = [
        Line(
            name,
            {"a second": 1e6 / us, "µs": us, "x signature": us / samples[SIGN if name in {SIGN, ISSUE} else VERIFY]},
        )
        for name, us in samples.items()
    ]
    return [Grid("Identity tokens", COLUMNS, lines, NOTE)]


def _cases() -> Mapping[str, Callable[[], float]]:
    """Return what is measured, each as microseconds per token."""
    now = int(time.time())
    state = with_key(State(trust_domain="bench.test", issuer="https://bench.test"), "bench", now)
    authority = Authority(state)
    grant = Grant(agent="bench", run="20260101T000000-bench0", user="bench", policy="0" * 64)
    demand = Demand(agent=grant.agent, run=grant.run)
    private = Ed25519PrivateKey.generate()
    public, message = private.public_key(), bytes(400)
    signature = private.sign(message)
    numbers = iter(range(1 << 40))
    known = authority.issue(grant, OWN_AUDIENCE, now, "known")

    def issue() -> str:
        return authority.issue(grant, OWN_AUDIENCE, now, f"token-{next(numbers)}")

    def fresh() -> float:
        made = [issue() for _ in range(COUNT)]
        began = time.perf_counter()
        for token in made:
            authority.verify(token, demand, now)
        return (time.perf_counter() - began) / COUNT * 1e6

    return {
        SIGN: lambda: _each(lambda: private.sign(message)),
        ISSUE: lambda: _each(issue),
        VERIFY: lambda: _each(lambda: public.verify(signature, message)),
        FRESH: fresh,
        KNOWN: lambda: _each(lambda: authority.verify(known, demand, now)),
    }


def _each(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    for _ in range(COUNT):
        call()
    return (time.perf_counter() - began) / COUNT * 1e6
