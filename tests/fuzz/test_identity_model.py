"""Identity against a model: whatever is issued, rotated, revoked, restarted and done to the clock, in any order.

The model is one line per token: it is good from its birth to its end, unless something named it, its run, its
agent or its key, or the clock was set back. The authority, its cache and the sealed document must agree.
"""

import dataclasses

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cloister.errors import DeniedError
from cloister.identity import state as transitions
from cloister.identity import vault
from cloister.identity.authority import Authority, Demand, Grant
from cloister.identity.state import STEP_S, State
from cloister.identity.tokens import LEEWAY_S, TokenError, key_id
from support.identity_bench import NOW

MASTER = bytes(32)
AGENTS, RUNS = st.sampled_from(["a", "b"]), st.sampled_from(["r1", "r2", "r3"])


@dataclasses.dataclass
class Known:
    """What the model knows of a token."""

    token: str
    agent: str
    run: str
    jti: str
    kid: str
    born: int
    ends: int
    void: bool = False


class Model(RuleBasedStateMachine):
    """Any order of everything that can happen."""

    @initialize()
    def begin(self) -> None:
        """Start with nothing."""
        self.now = NOW
        self.authority = Authority(State(trust_domain="t", issuer="spiffe://t"))
        self.tokens: list[Known] = []
        self.revoked: set[str] = set()
        for agent, run, life in (("a", "r1", 900), ("a", "r1", 600), ("a", "r2", 900), ("b", "r1", 900)):
            self.issue(agent, run, life)

    def void(self, **what: str) -> None:
        """Mark tokens in the model."""
        for token in self.tokens:
            token.void |= all(getattr(token, name) == value for name, value in what.items())

    @rule(agent=AGENTS, run=RUNS, life=st.integers(60, 900))
    def issue_one(self, agent: str, run: str, life: int) -> None:
        """Issue a token; refused only where something was revoked."""
        self.issue(agent, run, life)

    def issue(self, agent: str, run: str, life: int) -> None:
        """Do so."""
        grant = Grant(agent=agent, run=f"{run}-{agent}", user="u", policy="p", lifetime_s=life, since=self.now)
        self.authority.update(transitions.with_key(self.authority.state, agent, self.now))
        jti = f"j{len(self.tokens)}"
        try:
            token = self.authority.issue(grant, "cloister", self.now, jti)
        except DeniedError:
            assert {agent, grant.run} & self.revoked
            return
        born = Known(token, agent, grant.run, jti, key_id(token), self.now, self.now + life)
        self.tokens.append(born)

    @rule(agent=AGENTS)
    def rotate(self, agent: str) -> None:
        """A rotation takes nothing away."""
        self.authority.update(transitions.rotate(self.authority.state, agent, self.now))

    @rule(agent=AGENTS, run=RUNS, known=st.booleans())
    def revoke_run(self, agent: str, run: str, known: bool) -> None:
        """Revoke a run, by whoever knows its agent or not."""
        name = f"{run}-{agent}"
        self.revoked.add(name)
        self.void(run=name)
        state = transitions.revoke(self.authority.state, "run", name, self.now, agent=agent if known else "")
        self.authority.update(state)

    @rule(agent=AGENTS)
    def revoke_agent(self, agent: str) -> None:
        """Revoke an agent."""
        self.revoked.add(agent)
        self.void(agent=agent)
        self.authority.update(transitions.revoke(self.authority.state, "agent", agent, self.now))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), kind=st.sampled_from(["key", "token"]))
    def revoke_by_token(self, data: st.DataObject, kind: str) -> None:
        """Revoke one token, or the key that signed it."""
        one = data.draw(st.sampled_from(self.tokens))
        name = one.kid if kind == "key" else one.jti
        self.void(**({"kid": name} if kind == "key" else {"jti": name}))
        self.authority.update(transitions.revoke(self.authority.state, kind, name, self.now, agent=one.agent))

    @rule(seconds=st.integers(1, 400) | st.sampled_from([0, 1200, 31 * 86400]))
    def pass_time(self, seconds: int) -> None:
        """Let time go by."""
        self.now += seconds

    @rule(seconds=st.integers(1, STEP_S) | st.integers(1, 5000))
    def set_back(self, seconds: int) -> None:
        """Set the clock back: a little is borne, more ends everything."""
        self.now -= seconds
        if self.authority.state.seen - self.now > STEP_S:
            self.void()
            self.authority.update(transitions.clock_set_back(self.authority.state, self.now))

    @rule(cold=st.booleans())
    def restart(self, cold: bool) -> None:
        """Read the state back from its sealed form, in another process (without the cache) or in this one."""
        state = vault.unseal(vault.seal(self.authority.state, MASTER), MASTER)
        assert state == self.authority.state
        if cold:
            self.authority = Authority(state)
        else:
            self.authority.update(state)

    @invariant()
    def every_token_is_what_the_model_says(self) -> None:
        """Asked twice, so that the second answer may come from the cache."""
        for one in getattr(self, "tokens", []):
            good = not one.void and one.born - LEEWAY_S <= self.now < one.ends
            for _ in range(2):
                try:
                    self.authority.verify(one.token, Demand(), self.now)
                    found = True
                except TokenError:
                    found = False
                assert found == good, (one, self.now)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=150, stateful_step_count=20, deadline=None)
