"""What `cloister-hostd` asks of the system's broker for one run, as values.

hostd vouches for who asks, as which account and where: that is the kernel's word. The words, the environment and
the user's part are the caller's, and are judged here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from cloister.errors import DeniedError, UsageError
from cloister.plan.unit import Account
from cloister.runs.request import RunRequest, decode
from cloister.runs.store import is_id
from cloister.runs.unit_request import UserPart

_PROJECT = re.compile(r"[0-9a-f]{16}")
_NAME = re.compile(r"[^/\x00-\x1f\x7f]+(/[^/\x00-\x1f\x7f]+)*")
_CARRIED_KINDS = ("file", "directory")


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """One request for a run under systemd."""

    request: RunRequest
    part: UserPart
    account: Account
    caller_uid: int
    home: str
    """The caller's."""
    root: str
    """The workspace, as hostd walked to it."""
    directory: str
    idmap: bool = True
    """The workspace's file system is known to have idmapped mounts."""
    repository: str = ""
    """The git directory of a workspace that has it elsewhere, as hostd walked to it."""


def decode_asked(fields: Mapping[str, str], part: bytes, words: list[bytes], environment: list[bytes]) -> Asked:
    """Build a request.

    Raises:
        UsageError: it is malformed.
        DeniedError: the user's part is about another place than the one that hostd looked at.
    """
    try:
        said = msgspec.json.decode(part, type=UserPart)
    except msgspec.DecodeError as error:
        raise UsageError("request-malformed", f"the user's part of the request is not understood: {error}") from None
    root, directory, run = fields.get("root", ""), fields.get("directory", ""), fields.get("run", "")
    if run and not is_id(run):
        raise UsageError("request-malformed", f"{run[:32]!r} is not the id of a run")
    if said.layout.root != root:
        raise DeniedError("workspace-changed", "the workspace is not where it was when it was looked at", where=root)
    _check_part(said)
    try:
        uid, account_uid = int(fields["caller_uid"]), int(fields["account_uid"])
        caller, account, home = fields["caller"], fields["account"], fields["home"]
    except (KeyError, ValueError):
        raise UsageError("request-malformed", "hostd did not say who asks") from None
    request = msgspec.structs.replace(
        decode({**fields, "id": run, "directory": directory}, words, environment), extra_names=said.extra_names
    )
    return Asked(
        request=request, part=said, caller_uid=uid, home=home, root=root, directory=directory,
        idmap=fields.get("idmap", "1") == "1", repository=fields.get("repository", ""),
        account=Account(name=account, uid=account_uid, agent=request.agent, user=caller),
    )  # fmt: skip


def _check_part(part: UserPart) -> None:
    """Refuse names that are none: nothing of a user's part may lead anywhere but below a base of ours."""
    wrong = not _PROJECT.fullmatch(part.project)
    for name, kind in part.carried:
        wrong |= kind not in _CARRIED_KINDS or not _NAME.fullmatch(name) or {".", ".."} & set(name.split("/")) != set()
    if wrong:
        raise UsageError("request-malformed", "the user's part of the request has a name that is none")
