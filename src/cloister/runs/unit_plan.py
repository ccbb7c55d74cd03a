"""The plan of a run under systemd, made by the person's own process: what `cloister plan` and `explain` look at.

It does what the user's broker, `cloister-hostd` and the system's broker do together, from the files that anybody may
read: the system's policy, and `system.json`. Nothing is asked, started or made. What only root could
read is left out, and said.
"""

from __future__ import annotations

import os

import msgspec

from cloister.errors import DeniedError, PolicyError, UnsupportedError
from cloister.plan.unit import SYSTEM_FILE, Account, System
from cloister.policy.model import Agent
from cloister.runs.file_variables import FileVariables, fit
from cloister.runs.prepare import Kitchen, Looked, Prepared
from cloister.runs.request import RunRequest
from cloister.runs.unit_asked import Asked
from cloister.runs.unit_part import carried_environment, of_home_for, part_of, refuse_unfit, repository_of
from cloister.runs.unit_prepare import UnitKitchen, system_paths

_UNREAD = "variables of files that only root reads are not shown"


class _Planner(UnitKitchen):
    """The kitchen of the system's broker in a process that may read less."""

    def _files_for(self, asked: Asked, agent: Agent, name: str) -> FileVariables:  # type: ignore[explicit-override]  # Python 3.12
        try:
            return super()._files_for(asked, agent, name)
        except PolicyError:
            return FileVariables(fit(dict(asked.part.variables), agent), {}, (*asked.part.notices, _UNREAD))


def prepare_unit_plan(cook: Kitchen, request: RunRequest, looked: Looked) -> Prepared:
    """Return the run as the system's broker would prepare it.

    Raises:
        CloisterError: what would stop such a run before its unit is made.
    """
    refuse_unfit(looked, cook.policies, request.profile)
    account = account_of(cook.owner.name, looked.resolved.name)
    home = of_home_for(looked, cook)
    os.close(home.packed.memory)
    asked = Asked(
        request=msgspec.structs.replace(request, environment=carried_environment(looked, request)),
        part=part_of(looked, request, cook.policies, cook.git(), home),
        account=account,
        caller_uid=cook.owner.uid,
        home=cook.paths.home,
        root=looked.layout.root,
        directory=os.path.realpath(request.directory),
        repository=repository_of(looked.layout),
    )
    return _Planner(system_paths(), cook.owner).prepare_unit(asked)


def account_of(user: str, agent: str, path: str = SYSTEM_FILE) -> Account:
    """Return the account that an agent has for a user, as root has written it down.

    Raises:
        UnsupportedError: `hostd-missing`, where nothing is set up.
        DeniedError: `not-granted`: the policy has changed since, or never said so.
    """
    try:
        with open(path, "rb") as file:
            system = msgspec.json.decode(file.read(), type=System)
    except (OSError, msgspec.DecodeError):
        message = "this system has no accounts for agents yet"
        raise UnsupportedError("hostd-missing", message, where=path, remedy="sudo cloister setup") from None
    names = [grant.account for grant in system.grants if (grant.user, grant.agent) == (user, agent)]
    for account in system.accounts:
        if account.name in names:
            return account
    message = f"{user} has no account for {agent!r}: what the policy says was not applied yet"
    raise DeniedError("not-granted", message, where=path, remedy="sudo cloister apply")
