"""The identity of one user, opened: files, master key and clock joined to the pure core in `identity/`.

Any process of the user may have one open: the broker, the command line, the service on 2082.
All of them read the document again when it has changed (one stat(2) per question), and write it
under one lock. So a revocation made by one holds in all of them from then on.

Imported late: it brings cryptography with it.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping

import msgspec

from cloister.errors import CloisterError, DeniedError, UsageError
from cloister.host import key_store, master_key
from cloister.host.key_store import KeyFiles
from cloister.host.master_key import Source
from cloister.identity import state as transitions
from cloister.identity import vault
from cloister.identity.authority import Authority, Demand, Grant
from cloister.identity.keys import Seed
from cloister.identity.principal import check_issuer, check_trust_domain, default_trust_domain
from cloister.identity.state import State
from cloister.identity.tokens import Claims

DIRECTORY = "identity"
"""Below the user's state directory."""
_FORMAT = "a master key is 64 hexadecimal digits, such as: openssl rand -hex 32"


class IdentityStore:
    """Keys, tokens and revocations of one user. Safe for threads; every method may wait for the lock."""

    def __init__(
        self, directory: str, environ: Mapping[str, str], *, hostname: str = "", clock: Callable[[], float] = time.time
    ) -> None:
        """Name the store; nothing is read or made yet."""
        self._files = KeyFiles(directory)
        self._environ = {name: value for name, value in environ.items() if name in _VARIABLES}
        self._hostname = hostname
        self._clock = clock
        self._latest = 0.0
        self._master = b""
        self._authority: Authority | None = None
        self._guard = threading.RLock()

    def __repr__(self) -> str:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        return f"IdentityStore({self._files.directory!r})"  # never the environment or the master key

    def close(self) -> None:
        """Let go of the files; the store may be used again."""
        self._files.close()

    @property
    def source(self) -> Source:
        """Where the master key comes from."""
        return master_key.find_source(self._environ, self._files.directory)

    def exists(self) -> bool:
        """Say whether anything was issued here yet."""
        return self._files.exists()

    def read(self) -> State:
        """Return the state as it is now.

        Raises:
            UsageError: there is none yet.
            DeniedError: the master key is missing or wrong, or the files are damaged or unsafe.
        """
        with self._guard:
            return self._fresh().state

    # --- tokens -----------------------------------------------------------------------------------

    def issue(self, grant: Grant, audience: str, *, lifetime_s: int = 0) -> tuple[str, str]:
        """Return a token and its `jti`; make the store, or the agent's key, where there is none.

        Raises:
            DeniedError: the grant does not hold it, or the run or agent was revoked.
            UnsupportedError: a name cannot stand in a token.
        """
        with self._guard:
            authority = self._fresh(create=True)
            now, jti = self._now(), secrets.token_urlsafe(16)
            authority.principal(grant)
            key = authority.state.signing_key(grant.agent)
            if key is None or now - key.created >= transitions.KEY_LIFE_S:
                authority = self.change(lambda state, at: transitions.with_key(state, grant.agent, at))
            return authority.issue(grant, audience, now, jti, lifetime_s), jti

    def verify(self, token: str, demand: Demand) -> Claims:
        """Return what a token proves, by the state as it is now.

        Raises:
            TokenError: nothing; `reference` says why.
            CloisterError: the store cannot be opened.
        """
        with self._guard:
            authority = self._fresh()
            return authority.verify(token, demand, self._now())

    def jwks(self) -> dict[str, list[dict[str, str]]]:
        """Return the public keys, for verifiers elsewhere (RFC 7517)."""
        with self._guard:
            return self._fresh().jwks(self._now())

    # --- changes ----------------------------------------------------------------------------------

    def revoke_run(self, run: str, agent: str = "", *, ended: bool = False) -> None:
        """Make every token of a run void. For a run that has ended, that need not be remembered for long."""
        keep_s = transitions.OVERLAP_S if ended else transitions.BY_HAND_S
        self.change(lambda state, now: transitions.revoke(state, "run", run, now, agent=agent, keep_s=keep_s))

    def revoke_tokens(self, jtis: tuple[str, ...], agent: str) -> None:
        """Make single tokens void."""

        def step(state: State, now: int) -> State:
            for jti in jtis:
                state = transitions.revoke(state, "token", jti, now, agent=agent)
            return state

        self.change(step)

    def revoke_agent(self, agent: str) -> None:
        """Make every token of an agent void, end its keys, and give its living runs no more."""
        self.change(lambda state, now: transitions.revoke(state, "agent", agent, now))

    def revoke_key(self, kid: str) -> None:
        """End one key and every token it signed.

        Raises:
            UsageError: no key has that id.
        """

        def step(state: State, now: int) -> State:
            if kid not in {key.kid for key in state.keys}:
                raise UsageError("key-unknown", "no key has this id", where=kid[:64], remedy="cloister identity show")
            return transitions.revoke(state, "key", kid, now)

        self.change(step)

    def rotate(self, agent: str = "") -> tuple[str, ...]:
        """Give one agent, or all that have one, a new key; return their names.

        Raises:
            UsageError: the agent has none.
        """
        found: list[str] = []

        def step(state: State, now: int) -> State:
            agents = sorted({key.agent for key in state.keys if key.signs})
            found[:] = [name for name in agents if agent in ("", name)]
            if agent and not found:
                raise UsageError("key-unknown", f"the agent {agent!r} has no key yet", remedy="cloister identity show")
            for name in found:
                state = transitions.rotate(state, name, now)
            return state

        self.change(step)
        return tuple(found)

    def configure(self, *, trust_domain: str = "", issuer: str = "") -> State:
        """Set the trust domain or the issuer. Tokens that are out name the old ones, and are void by that.

        Raises:
            UsageError: one of them is malformed.
        """
        names: dict[str, str] = {}
        if trust_domain:
            names |= {"trust_domain": check_trust_domain(trust_domain), "issuer": f"spiffe://{trust_domain}"}
        if issuer:
            names["issuer"] = check_issuer(issuer)

        def step(state: State, now: int) -> State:
            epochs = state.epochs | {"*": state.generation + 1}
            return msgspec.structs.replace(
                state, generation=state.generation + 1, epochs=epochs, seen=max(now, state.seen), **names
            )

        return self.change(step, create=True).state

    def derive(self, purpose: str) -> bytes:
        """Return 32 bytes for another use, the same ones every time, also after `rotate_master`.

        They are random, made at the first call and sealed like agents' keys: were they computed from the master
        key itself, what was encrypted with them would be lost with it.

        Args:
            purpose: a fixed name such as `llm-recordings`; a name that is used for one thing only.
        """
        with self._guard:
            state = self._fresh(create=True).state
            if purpose not in state.purposes:
                made = Seed(secrets.token_bytes(32))

                def step(now_state: State, _now: int) -> State:
                    kept = {purpose: made} | now_state.purposes  # another process may have been first
                    return msgspec.structs.replace(now_state, generation=now_state.generation + 1, purposes=kept)

                state = self.change(step).state
            return state.purposes[purpose].value

    def rotate_master(self, new_key: str = "") -> str:
        """Seal everything anew under another master key; return where that key is to be found from now on.

        Args:
            new_key: its text. Needed where the old one is not ours to replace; else one is generated.

        Raises:
            UsageError: no new key was given where one is needed, or it is malformed.
        """
        with self._guard, self._files.locked():
            state, source = self._load(), self.source
            if not new_key and not source.ours:
                raise UsageError(
                    "master-key-not-ours", f"the master key comes from {source.what}, where we cannot put another",
                    remedy="cloister identity rotate-master --new-key FILE; then set it there",
                )  # fmt: skip
            text = new_key or secrets.token_hex(vault.MASTER_BYTES)
            master = _parse(text, "the new master key")
            if source.ours:
                key_store.begin_change(source.path, text.strip())
            self._write(msgspec.structs.replace(state, generation=state.generation + 1), master)
            if source.ours:
                key_store.finish_change(source.path)
            return source.path or source.what

    def change(self, step: Callable[[State, int], State], *, create: bool = False) -> Authority:
        """Bring the state one step further, under the lock, and keep it.

        Raises:
            CloisterError: what `step` raised, or the store cannot be opened; nothing was changed.
        """
        with self._guard, self._files.locked():
            before, now = self._load(create=create), self._clock()
            begun = before
            if self._was_set_back(before, now):
                begun, self._latest = transitions.clock_set_back(before, int(now)), now
            after = step(begun, int(now))
            if after is not before:
                self._write(after, self._master)
            assert self._authority is not None  # noqa: S101  # `_load` made it
            return self._authority

    # --- inside -----------------------------------------------------------------------------------

    def _now(self) -> float:
        """Return the time; where the clock was set back, end every key of before first."""
        now = self._clock()
        if self._authority is not None and self._was_set_back(self._authority.state, now):
            self.change(lambda state, _: state)
        self._latest = max(self._latest, now)
        return now

    def _was_set_back(self, state: State, now: float) -> bool:
        return max(self._latest, float(state.seen)) - now > transitions.STEP_S

    def _fresh(self, *, create: bool = False) -> Authority:
        """Return the authority for the document as it is now."""
        if self._authority is None or self._files.changed():
            with self._files.locked():
                self._load(create=create)
        assert self._authority is not None  # noqa: S101  # `_load` made it
        return self._authority

    def _load(self, *, create: bool = False) -> State:
        """Read the document; the lock is held."""
        if self._authority is not None and not self._files.changed():
            return self._authority.state
        document = self._files.read()
        if document is None:
            if not create:
                raise UsageError("identity-none", "nothing was issued here yet, so there are no keys",
                                 where=self._files.directory)  # fmt: skip
            return self._create()
        self._master = self._master_for(document)
        self._adopt(vault.unseal(document, self._master))
        assert self._authority is not None  # noqa: S101  # adopted just now
        return self._authority.state

    def _create(self) -> State:
        """Make a store, and its master key where none is given."""
        source = self.source
        text = master_key.read_master(source, self._environ)
        if text is None:
            if not source.generated:
                raise _missing(source)
            text = secrets.token_hex(vault.MASTER_BYTES)
            self._files.make_master(text)
        domain = check_trust_domain(self._environ.get("CLOISTER_TRUST_DOMAIN") or default_trust_domain(self._hostname))
        state = State(trust_domain=domain, issuer=f"spiffe://{domain}")
        self._write(state, _parse(text, source.what))
        return state

    def _master_for(self, document: bytes) -> bytes:
        """Return the key that opens a document; finish or forget a change of it that was broken off."""
        if self._master and vault.opens(document, self._master):
            return self._master
        source = self.source
        text = master_key.read_master(source, self._environ)
        following = key_store.next_path(source.path) if source.ours else ""
        if following and os.path.lexists(following):
            upcoming = vault.parse_master(master_key.as_text(key_store.read_private(following), following) or "")
            if upcoming is not None and vault.opens(document, upcoming):
                key_store.finish_change(source.path)
                return upcoming
        if text is None:
            raise _missing(source)
        master = _parse(text, source.what)
        if not vault.opens(document, master):
            raise DeniedError(
                "master-key-wrong", f"the master key from {source.what} is not the one this key store was sealed with",
                where=source.path or self._files.directory, remedy="give it the key it was made with",
            )  # fmt: skip
        if following:
            key_store.drop_next(source.path)
        return master

    def _write(self, state: State, master: bytes) -> None:
        self._files.write(vault.seal(state, master))
        self._master = master
        self._adopt(state)

    def _adopt(self, state: State) -> None:
        self._files.hold()
        if self._authority is None:
            self._authority = Authority(state)
        else:
            self._authority.update(state)


_VARIABLES = (master_key.KEY, master_key.KEY_PATH, "CREDENTIALS_DIRECTORY", "CLOISTER_TRUST_DOMAIN")


def _parse(text: str, what: str) -> bytes:
    master = vault.parse_master(text)
    if master is None:
        raise DeniedError("master-key-invalid", f"{what} holds no master key", remedy=_FORMAT)
    return master


def _missing(source: Source) -> CloisterError:
    return DeniedError(
        "master-key-missing", f"the master key ({source.what}) is not there, and nothing else opens the key store",
        where=source.path, remedy="put the key back; a new one would not open what the old one has sealed",
    )  # fmt: skip
