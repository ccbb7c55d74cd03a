"""The `/etc` of a unit: a copy that root assembles for the account, where only root can change it.

The system's broker says in the plan which copy it means, by a name that is a digest of what goes into one. What
is made is what this process finds, so a plan can choose nothing but to be refused.
"""

from __future__ import annotations

import os

from cloister.errors import RetryError
from cloister.host import etc
from cloister.host.owner import Owner
from cloister.plan.steps import Launch, Plan
from cloister.plan.unit import RUNTIME, Account

ETC_COPIES = f"{RUNTIME}/etc"
_PROPERTY, _TARGET = "BindReadOnlyPaths", ":/etc"


def make_etc(plan: Plan, account: Account, copies: str = ETC_COPIES) -> None:
    """Make the copy that a plan names, where it is not there yet. The plan need not be above the floor yet.

    Raises:
        RetryError: the host's `/etc` is another one than when the plan was made.
        OSError: it cannot be made.
    """
    units = [step.unit for step in plan.steps if isinstance(step, Launch) and step.unit]
    values = [value for unit in units for name, value in unit.properties if name == _PROPERTY]
    named = [value.removesuffix(_TARGET) for value in values if value.startswith(f"{copies}/")]
    if not named:
        return  # the floor looks at what is mounted there instead
    os.makedirs(copies, mode=0o755, exist_ok=True)
    os.chmod(copies, 0o755)  # noqa: S103  # a copy of what is public; units read it
    owner = Owner(account.uid, account.uid, account.name, f"/home/{account.name}")
    if etc.assemble(copies, owner, hostname="cloister") not in named:
        raise RetryError("etc-changed", "the system's /etc has changed meanwhile", where=named[0], remedy="try again")
