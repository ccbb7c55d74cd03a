"""Model calls of a user's runs: from the policy's words to callers, upstreams and budgets that live in the broker.

One `ModelCalls` per process. It opens the books with the first run that needs them, keeps one account per agent and
user, so that all runs of an agent share its budgets, and one supply per provider, so that they share connections. A
reload gives living runs new limits; what was used stays used.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

from cloister.errors import PolicyError, Problem
from cloister.llm.access import Access
from cloister.llm.budgets import Account, Alert, compile_limits
from cloister.llm.errors import Refusal
from cloister.llm.ledger import Books
from cloister.llm.redact import Wish, wish_of
from cloister.policy.model import Llm, Policy, Provider
from cloister.relay.llm.service import Caller, Inference, Prices
from cloister.relay.llm.supply import Supply
from cloister.runs.model_blocks import reason_for
from cloister.runs.model_signers import signer_for
from cloister.runs.redaction import Redaction

if TYPE_CHECKING:
    from cloister.runs.model_keys import ProviderKey, ProviderKeys

PORT = 11435
"""Where model traffic is served inside a sandbox, and by the service outside."""


class _Store(Protocol):
    """Opens the books; called once, with the first run that needs them."""

    def __call__(self) -> Books:
        """Return them."""
        ...


class _Kept(NamedTuple):
    """A provider as it was opened, and what it was opened from."""

    provider: Provider
    login_headers: dict[str, str]
    supply: Supply
    key: ProviderKey | None


class ModelCalls:
    """The model calls of one process."""

    def __init__(
        self, store: _Store, prices: Callable[[], Prices], keys: Callable[[], ProviderKeys],
        blocks: Callable[[], Mapping[str, str]] = dict,
    ) -> None:  # fmt: skip
        """Open nothing yet; the arguments say how. `blocks` gives the agents that may not call, each with a reason."""
        self._store, self._prices, self._keys_of, self._blocks = store, prices, keys, blocks
        self._keys: ProviderKeys | None = None
        self._inference: Inference | None = None
        self._accounts: dict[tuple[str, str], Account] = {}
        """By agent and user."""
        self._wishes: dict[str, Wish] = {}
        self._supplies: dict[str, _Kept] = {}

    @property
    def inference(self) -> Inference:
        """Return the proxy's shared part, made with the first call of this."""
        if self._inference is None:
            self._inference = Inference(self._store(), self._prices)
        return self._inference

    def caller(  # noqa: PLR0913 - who, and by which words of the policy
        self, run: str, agent: str, user: str, llm: Llm, policy: Policy, *, token: str = "",
        record: Callable[[str, dict[str, object]], None] | None = None,
    ) -> Caller:  # fmt: skip
        """Return the caller that a run is, with what its policy allows.

        Raises:
            PolicyError: it names a provider that the policy does not have, or a login that is for other hosts.
            CloisterError: it names a login that is not there.
        """
        supplies = self._supplies_of(agent, llm, policy.providers)
        account = self._account(agent, llm, user)
        caller = Caller(run, agent, user, Access(llm), supplies, account, token=token)
        if record is not None:
            caller.record = record
        self._apply(caller, llm)
        return caller

    async def check_keys(self, llm: Llm) -> None:
        """Read the keys of an agent's providers once; `caller` has opened them.

        Raises:
            CloisterError: one cannot be had; says which, and what to type.
        """
        for name in llm.providers:
            key = self._supplies[name].key
            if key is not None:
                await key.check()

    def update(self, caller: Caller, llm: Llm, policy: Policy) -> None:
        """Put a new policy in force for a living run, its budgets included.

        Raises:
            CloisterError: as `caller`; nothing is changed then.
        """
        caller.supplies = self._supplies_of(caller.agent, llm, policy.providers)
        caller.access = Access(llm)
        self._account(caller.agent, llm, caller.user)
        self._apply(caller, llm)

    def obey_blocks(self) -> int:
        """Read again who is blocked; return how many calls under way were ended by that."""
        blocks = self._blocks()
        for (agent, _), account in self._accounts.items():
            account.blocked = reason_for(blocks, agent)
        found = [call for call in self.inference.calls if call.caller.account.blocked] if self._inference else []
        for call in found:
            reason = call.caller.account.blocked
            call.cut(Refusal(403, "agent-blocked", f"this agent's model calls are blocked: {reason}", again=False))
        return len(found)

    def left(self, caller: Caller) -> None:
        """A run is over."""
        caller.account.forget_run(caller.run)
        self._end_redaction(caller)

    def budget_shares(self) -> dict[tuple[str, str, str], float]:
        """Return the used part of every agent's budgets, by agent, span and unit: of the user who has used most."""
        shares: dict[tuple[str, str, str], float] = {}
        for (agent, _), account in self._accounts.items():
            for (span, unit), share in account.shares().items():
                shares[agent, span, unit] = max(share, shares.get((agent, span, unit), 0.0))
        return shares

    def account(self, agent: str, user: str) -> Account | None:
        """Return the account of an agent and user, if they have called since the process began."""
        return self._accounts.get((agent, user))

    async def close(self) -> None:
        """End what is under way."""
        if self._inference is not None:
            await self._inference.close()

    def _account(self, agent: str, llm: Llm, user: str) -> Account:
        account = self._accounts.get((agent, user))
        limits = compile_limits(llm)
        if account is None:
            books = self.inference.books
            account = self._accounts[agent, user] = Account(limits, partial(books.spent, agent, user=user))
            account.blocked = reason_for(self._blocks(), agent)
        account.limits = limits
        return account

    def _apply(self, caller: Caller, llm: Llm) -> None:
        """Set what is neither upstream nor model nor budget."""
        caller.max_tokens, caller.fallback = llm.max_tokens, llm.fallback
        caller.asks = llm.on_exhausted == "ask"
        wish = wish_of(llm, caller.token)
        if self._wishes.get(caller.run) != wish:
            self._end_redaction(caller)
        if wish is not None and caller.redactor is None:
            caller.redactor, self._wishes[caller.run] = Redaction(wish), wish

    def _end_redaction(self, caller: Caller) -> None:
        self._wishes.pop(caller.run, None)
        if caller.redactor is not None:
            caller.redactor.close()
            caller.redactor = None

    def _supplies_of(self, agent: str, llm: Llm, providers: Mapping[str, Provider]) -> tuple[Supply, ...]:
        missing = [name for name in llm.providers if name not in providers]
        if missing:
            message = f"there is no provider {missing[0]!r}"
            raise PolicyError([Problem(message, f".agents.{agent}.llm.providers", f"[providers.{missing[0]}]")])
        return tuple(self._supply(name, providers[name]) for name in llm.providers)

    def _supply(self, name: str, provider: Provider) -> Supply:
        """Return a provider's supply, made anew when its table or its login has changed."""
        if self._keys is None:
            self._keys = self._keys_of()
        login_headers = self._keys.login_headers(provider)
        kept = self._supplies.get(name)
        if kept is None or (kept.provider, kept.login_headers) != (provider, login_headers):
            upstream, key = self._keys.open(name, provider, login_headers)
            supply = Supply(upstream, key, signer_for(upstream, key))
            kept = self._supplies[name] = _Kept(provider, login_headers, supply, key)
        elif kept.key is not None:
            self._keys.refuse_host(name, provider, kept.supply.upstream)
        return kept.supply


def new_placeholder() -> str:
    """Return a key for one run: it opens nothing but that run's own way to the proxy."""
    return f"cloister-{secrets.token_urlsafe(24)}"


def alert_fields(alert: Alert) -> dict[str, object]:
    """Return an alert as the fields of an event."""
    return {"reason": alert.reason, "percent": alert.percent, "used": alert.used, "limit": alert.limit}


def protocols_of(llm: Llm, providers: Mapping[str, Provider]) -> Iterable[str]:
    """Return the protocols an agent's providers speak, in the agent's order, once each."""
    return dict.fromkeys(providers[name].protocol for name in llm.providers if name in providers)
