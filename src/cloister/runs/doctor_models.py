"""What the doctor says about model calls: whether the ledger can be used, and whether providers' keys can be read.

Only where the policy has providers. A key is read as the broker would read it and shown nowhere; a login is looked at
and not renewed, for that is the broker's. The judgement on the host itself is `doctor`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping
from contextlib import closing

from cloister.errors import CloisterError, UnsupportedError
from cloister.host.ledger import SCHEMA, LedgerCorruptError, LedgerDownError
from cloister.host.owner import Owner
from cloister.policy.load import load_document
from cloister.policy.model import Ledger, Provider
from cloister.runs.books_open import directory, ledger_place
from cloister.runs.doctor import Finding, State
from cloister.runs.login_files import login_of
from cloister.runs.login_secrets import LoginSecrets
from cloister.runs.model_keys import ProviderKeys, login_warnings
from cloister.runs.paths import Paths
from cloister.runs.policies import PolicyFiles

_CALLS = "model calls"
_STARTS = frozenset({"command", "keyring", "pass"})
"""References that a program is started for."""
_BROKERS = frozenset({"env", "systemd"})
"""References that only the broker's own process can read."""


def model_findings(paths: Paths, owner: Owner, environment: Mapping[str, str], *, quick: bool) -> tuple[Finding, ...]:
    """Return the findings about ledger and keys; none where no policy has providers, or it cannot be read.

    Args:
        paths: this user's places.
        owner: this user.
        environment: of this process.
        quick: start no program, and connect to nothing.
    """
    files = PolicyFiles(paths, owner.uid)
    try:
        policy = load_document(files.document(), preset_names=tuple(files.presets()))
        settings = files.ledger()
    except CloisterError:
        return ()  # `cloister check` says what is wrong with it
    if not policy.providers:
        return ()
    keys = ProviderKeys(paths, owner, environment, LoginSecrets(paths.logins, lambda _event: None))
    looked = _Look(paths, keys, quick=quick)
    return (looked.ledger(settings), *looked.keys(policy.providers))


class _Look:
    """Looks at what the policy names."""

    def __init__(self, paths: Paths, keys: ProviderKeys, *, quick: bool) -> None:
        self._paths, self._keys, self._quick = paths, keys, quick

    def ledger(self, settings: Ledger) -> Finding:
        """Look at the ledger."""
        path = f"{directory(self._paths.state)}/ledger.db"
        if not settings.database and not os.path.lexists(path):
            return _ledger("ok", f"{path} is made with the first call")
        if settings.database and self._quick:
            return _ledger("degraded", f"nobody tried to connect ({settings.database})", "cloister doctor")
        try:
            size = self._size(settings, path)
        except (LedgerDownError, LedgerCorruptError) as error:
            remedy = "cloister usage" if settings.database else f"mv {path} {path}.broken"
            return _ledger("missing", f"it cannot be read: {error}", remedy)
        except UnsupportedError as error:
            return _ledger("missing", error.message, error.remedy)
        where = f"PostgreSQL ({settings.database})" if settings.database else path
        return _ledger("ok", f"{where}, schema {SCHEMA}, {size / 1e6:.1f} MB")

    def _size(self, settings: Ledger, path: str) -> int:
        if not settings.database:
            from cloister.host.ledger_sqlite import SqliteLedger

            SqliteLedger(path, read_only=True).close()
            return sum(os.stat(name).st_size for name in (path, f"{path}-wal") if os.path.exists(name))
        from cloister.host.ledger_postgres import PostgresPlace

        place = ledger_place(self._paths.state, settings, alarm=lambda _text: None)
        assert isinstance(place, PostgresPlace)  # noqa: S101  # a database was named
        with closing(place.open()) as ledger:
            return ledger.size()

    def keys(self, providers: Mapping[str, Provider]) -> Iterator[Finding]:
        """Look at the keys of providers."""
        warned = {name: (what, remedy) for name, what, remedy in login_warnings(providers, self._keys.describe)}
        for name, provider in providers.items():
            scheme = provider.key.partition(":")[0]
            if name in warned:
                yield _key(name, "missing", *warned[name])
            elif not provider.key:
                yield _key(name, "ok", "none is needed")
            elif login_of(provider.key):
                yield _key(name, "ok", f"{provider.key} is there")
            elif scheme in _BROKERS:
                yield _key(name, "degraded", f"{provider.key} is the broker's, which a run asks when it starts")
            elif self._quick and scheme in _STARTS:
                yield _key(name, "degraded", f"nobody tried to read {provider.key}", "cloister doctor")
            else:
                yield self._read(name, provider)

    def _read(self, name: str, provider: Provider) -> Finding:
        key = self._keys.open(name, provider, {}).key
        assert key is not None  # noqa: S101  # asked before
        try:
            asyncio.run(key.check())
        except CloisterError as error:
            return _key(name, "missing", f"{error.message} ({provider.key})", error.remedy)
        return _key(name, "ok", f"{provider.key} can be read")


def _ledger(state: State, meaning: str, remedy: str = "") -> Finding:
    return Finding(name="ledger", state=state, needed_for=_CALLS, meaning=meaning, remedy=remedy)


def _key(name: str, state: State, meaning: str, remedy: str = "") -> Finding:
    return Finding(name=f"key {name}", state=state, needed_for=_CALLS, meaning=meaning, remedy=remedy)
