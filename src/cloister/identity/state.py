"""Everything the identity of one user consists of, as one value, and what may happen to it.

Transitions take a `State` and return the next one; nothing here knows files, clocks or
encryption. One value in one file is on purpose: whoever loses the revocations has lost the
keys as well, so a token cannot come back to life by deleting a list.

Times are whole seconds since the epoch, given by the caller.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from cloister.identity.keys import AgentKey, Seed, make_key
from cloister.identity.tokens import LEEWAY_S, MAX_LIFE_S

BY_HAND_S = 30 * 86400
"""How long a run revoked by a person is remembered: it may live on, and ask for new tokens."""
KEY_LIFE_S = 30 * 86400
"""Age at which a key is replaced at the next token."""
STEP_S = 2 * LEEWAY_S
"""A clock that goes back by more than this was set; less is ntpd at work."""
OVERLAP_S = MAX_LIFE_S + LEEWAY_S + STEP_S
"""How long a retired key is still published, and a revocation remembered: no token lives longer, whatever clocks do."""

Revocable = Literal["run", "agent", "key", "token"]


class Revoked(msgspec.Struct, frozen=True, kw_only=True):
    """One revocation: of a run or token by id; of keys and agents, the keys themselves are gone."""

    kind: Revocable
    id: str
    at: int
    until: int
    """When it cannot matter any more; 0 for never."""


class State(msgspec.Struct, frozen=True, kw_only=True):
    """Keys, revocations and names of one user's identity."""

    generation: int = 1
    """Rises with every change; what was verified before is verified anew."""
    trust_domain: str
    issuer: str
    keys: tuple[AgentKey, ...] = ()
    seeds: dict[str, Seed] = msgspec.field(default_factory=dict)
    """Private parts by `kid`, of keys that sign."""
    purposes: dict[str, Seed] = msgspec.field(default_factory=dict)
    """Keys for other uses (`derive`), by purpose. They stay when the master key changes."""
    revoked: tuple[Revoked, ...] = ()
    epochs: dict[str, int] = msgspec.field(default_factory=dict)
    """By agent (`*` for all): the generation of the last change that took something away from it."""
    seen: int = 0
    """The latest time known, so that a clock set back is noticed."""

    def signing_key(self, agent: str) -> AgentKey | None:
        """Return the key that signs for an agent, if it has one."""
        return next((key for key in self.keys if key.agent == agent and key.signs), None)

    def is_revoked(self, kind: Revocable, name: str) -> bool:
        """Say whether this very thing was revoked."""
        return any(one.kind == kind and one.id == name for one in self.revoked)

    def revoked_at(self, agent: str) -> int:
        """Return when an agent was last revoked; -1 for never."""
        return max((one.at for one in self.revoked if one.kind == "agent" and one.id == agent), default=-1)

    def epoch(self, agent: str) -> tuple[int, int]:
        """Return what changes when something was taken away from an agent."""
        return self.epochs.get(agent, 0), self.epochs.get("*", 0)


def with_key(state: State, agent: str, now: int) -> State:
    """Return a state in which an agent has a key that signs and is not too old."""
    current = state.signing_key(agent)
    if current is not None and now - current.created < KEY_LIFE_S:
        return state
    return rotate(state, agent, now)


def rotate(state: State, agent: str, now: int) -> State:
    """Give an agent a new key. The old one signs no more; it is published until its last token has expired."""
    version = 1 + max((key.version for key in state.keys if key.agent == agent), default=0)
    key, seed = make_key(agent, now, version)
    old = state.signing_key(agent)
    retired = tuple(msgspec.structs.replace(one, retired=now) if one is old else one for one in state.keys)
    seeds = {kid: kept for kid, kept in state.seeds.items() if old is None or kid != old.kid}
    return _next(state, now, keys=(*retired, key), seeds=seeds | {key.kid: seed})


def revoke(  # noqa: PLR0913  # two of them have defaults
    state: State, kind: Revocable, name: str, now: int, *, agent: str = "", keep_s: int = OVERLAP_S
) -> State:
    """Return a state in which every token of a run, agent, key or id is void.

    An agent's keys go with it; runs of it that began before get no new tokens, later ones do. A revoked key is
    replaced at the next token. `agent` says whose run or token it is, where that is known.
    """
    gone = {
        key.kid for key in state.keys if (kind == "agent" and key.agent == name) or (kind == "key" and key.kid == name)
    }
    owners = {key.agent for key in state.keys if key.kid in gone} | ({name} if kind == "agent" else set())
    touched = owners or {agent or "*"}
    until = 0 if kind == "agent" else now + keep_s
    others = tuple(one for one in state.revoked if (one.kind, one.id) != (kind, name))
    return _next(
        state,
        now,
        keys=tuple(key for key in state.keys if key.kid not in gone),
        seeds={kid: seed for kid, seed in state.seeds.items() if kid not in gone},
        revoked=(*others, Revoked(kind=kind, id=name, at=now, until=until)),
        epochs=state.epochs | dict.fromkeys(touched, state.generation + 1),
    )


def clock_set_back(state: State, now: int) -> State:
    """Return the state after the clock was set back: no key of before signs or counts any more.

    Tokens that had expired by the old time would be valid again by the new one, for as long as the difference.
    """
    return msgspec.structs.replace(
        state,
        generation=state.generation + 1,
        keys=(),
        seeds={},
        revoked=tuple(msgspec.structs.replace(one, at=min(one.at, now)) for one in state.revoked),
        epochs=state.epochs | {"*": state.generation + 1},
        seen=now,
    )


def _next(state: State, now: int, **changes: object) -> State:
    """Return the next generation, without what cannot matter any more."""
    changed = msgspec.structs.replace(state, **changes)
    keys = tuple(key for key in changed.keys if key.signs or now < key.retired + OVERLAP_S)
    return msgspec.structs.replace(
        changed,
        generation=state.generation + 1,
        keys=keys,
        revoked=tuple(one for one in changed.revoked if not one.until or now < one.until),
        seen=max(state.seen, now),
    )
