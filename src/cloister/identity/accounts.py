"""Which system account each agent of each user, and each instance of a service, has: names and numbers.

Static: an account is written down once and found again ever after, so files on disk always mean the same agent.
A number is not given out again while it is recorded, also when nobody may start that agent any more. Pure: what
the host has is told to it, and making accounts is for the host.

Sources: useradd(8) and sysusers.d(5) for names (31 characters), UIDS-GIDS of systemd for the range.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from cloister.errors import UnsupportedError
from cloister.plan.unit import ACCOUNT_PREFIX, FIRST_UID, UID_COUNT, Account

MAX_NAME = 31
"""systemd's strict rule, and that of utmp: 32 bytes with the closing zero."""
_HASH_DIGITS = 6
_OTHER = re.compile(r"[^a-z0-9-]+")


class Owner(NamedTuple):
    """Who an account is for: an agent for a user, or (without a user) a service, `NAME` or `NAME-INSTANCE`."""

    agent: str
    user: str = ""
    service: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is known by: a service keeps its account and its files when another agent serves it."""
        return ("", "", self.service) if self.service else self


class Entry(NamedTuple):
    """One line of passwd(5) or group(5): the name and its number."""

    name: str
    number: int


def assign(wanted: Iterable[Owner], recorded: Iterable[Account], host: Iterable[Entry]) -> tuple[Account, ...]:
    """Return all accounts there shall be: those recorded, unchanged and in their order, then new ones.

    Args:
        wanted: who needs one now.
        recorded: what was written down before.
        host: users and groups of the host.

    Raises:
        UnsupportedError: `uid-range-taken`, `account-name-taken` or `uid-range-full`.
    """
    needed = {owner.key: owner for owner in wanted}
    accounts = [_renewed(account, needed.get(_owner(account).key)) for account in recorded]
    host = tuple(host)
    _refuse_strangers(accounts, host)
    owned = {_owner(account).key for account in accounts}
    names = {account.name for account in accounts} | {entry.name for entry in host}
    numbers = {account.uid for account in accounts}
    free = (number for number in range(FIRST_UID, FIRST_UID + UID_COUNT) if number not in numbers)
    for owner in sorted(owner for key, owner in needed.items() if key not in owned):
        name = _name(owner, names)
        names.add(name)
        try:
            number = next(free)
        except StopIteration:
            message = f"all {UID_COUNT} numbers for accounts of agents are taken"
            raise UnsupportedError("uid-range-full", message, remedy="cloister uninstall --purge, then setup") from None
        accounts.append(Account(name=name, uid=number, agent=owner.agent, user=owner.user, service=owner.service))
    return tuple(accounts)


def find(accounts: Iterable[Account], owner: Owner) -> Account:
    """Return the account of an owner that `assign` was told of."""
    return next(account for account in accounts if _owner(account).key == owner.key)


def account_name(owner: Owner) -> str:
    """Return the name an owner gets where nobody else has it: `cl-AGENT-USER`, shortened where it is too long."""
    plain = _plain(owner)
    name = ACCOUNT_PREFIX + _OTHER.sub("-", plain.lower())
    return name if len(name) <= MAX_NAME and name == ACCOUNT_PREFIX + plain else _hashed(owner)


def _name(owner: Owner, taken: set[str]) -> str:
    """Two owners may come to one name (`a-b` for `c`, `a` for `b-c`): the second one's gets a hash."""
    for name in (account_name(owner), _hashed(owner)):
        if name not in taken:
            return name
    raise UnsupportedError(
        "account-name-taken",
        f"the host has accounts {account_name(owner)} and {_hashed(owner)} already, and they are not Cloister's",
        where="/etc/passwd",
        remedy="rename the agent, or remove these accounts",
    )


def _hashed(owner: Owner) -> str:
    plain = _OTHER.sub("-", _plain(owner).lower())
    digest = hashlib.sha256("\0".join(owner.key).encode()).hexdigest()[:_HASH_DIGITS]
    room = MAX_NAME - len(ACCOUNT_PREFIX) - _HASH_DIGITS - 1
    return f"{ACCOUNT_PREFIX}{plain[:room].rstrip('-')}-{digest}"


def _plain(owner: Owner) -> str:
    return "-".join(filter(None, (owner.service or owner.agent, owner.user)))


def _owner(account: Account) -> Owner:
    return Owner(account.agent, account.user, account.service)


def _renewed(account: Account, owner: Owner | None) -> Account:
    return account if owner is None else msgspec.structs.replace(account, agent=owner.agent)


def _refuse_strangers(accounts: list[Account], host: tuple[Entry, ...]) -> None:
    """Refuse a host where somebody else has a number of the range, or one of our names with another number."""
    numbers = {account.name: account.uid for account in accounts}
    for entry in host:
        ours = numbers.get(entry.name)
        if ours is not None and ours != entry.number:
            raise UnsupportedError(
                "account-changed",
                f"{entry.name} has the number {entry.number}, and Cloister gave it {ours}",
                where="/etc/passwd",
                remedy=f"userdel {entry.name}, then cloister apply",
            )
        if ours is None and FIRST_UID <= entry.number < FIRST_UID + UID_COUNT:
            raise UnsupportedError(
                "uid-range-taken",
                f"{entry.name} has the number {entry.number}, of the range that is kept for agents "
                f"({FIRST_UID} to {FIRST_UID + UID_COUNT - 1})",
                where="/etc/passwd",
                remedy="give it another number (usermod -u, groupmod -g)",
            )
