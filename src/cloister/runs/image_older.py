"""Going back to an older version of a guest image: a person's word, given to the broker, which records it first."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from cloister.errors import PolicyError, UsageError
from cloister.host.image_store import SeenVersions
from cloister.policy.model import Images
from cloister.runs.images import look, places, trust_of

if TYPE_CHECKING:
    from cloister.runs.audit_runs import RunAudit
    from cloister.runs.prepare import Kitchen


def allow_older(kitchen: Kitchen, audit: RunAudit, fields: dict[str, str]) -> dict[str, Any]:
    """Let runs use an older version again; answer with the version that was the oldest allowed one.

    Args:
        kitchen: whose broker this is.
        audit: where it is written down before it counts.
        fields: `name` and `version`.

    Raises:
        CloisterError: there is no such version, it is not trusted, or it cannot be recorded.
        OSError: the record of versions cannot be written.
    """
    name, number = fields.get("name", ""), fields.get("version", "")
    if not number.isascii() or not number.isdigit():
        raise UsageError("image-version", "a version is a number")
    policy = _policy(kitchen)
    where = places(os.environ, kitchen.paths, policy)
    found = look(where, trust_of(where, policy, os.getuid()), name, int(number))
    public = found.signer.public if found.signer else ""
    seen = SeenVersions(where.seen)
    was = seen.highest(name, public)
    audit.loosened(kitchen.owner.name, f"image {name} may be used from version {number} on again, after {was}")
    seen.note(name, public, int(number), lower=True)
    return {"name": name, "version": int(number), "was": was}


def _policy(kitchen: Kitchen) -> Images:
    """Return the table `images`; its defaults where there is no policy."""
    try:
        return kitchen.policies.images()
    except PolicyError as error:
        if error.reference == "policy-missing":
            return Images()
        raise
