"""Where a run finds its identity tokens: file names, the step of the plan, the variables. Pure, and on the hot path.

One file per audience in `/run/cloister/box/identity`, `cloister.jwt` for our own services, and
`index.json`, which says which file is for whom.
"""

from __future__ import annotations

import hashlib
import re

from cloister.isolation.inner import BOX
from cloister.plan.steps import IdentityTokens
from cloister.policy.model import Identity
from cloister.policy.units import parse_duration

OWN = "cloister"
DIRECTORY = "identity"
INDEX = "index.json"
VARIABLE = "CLOISTER_IDENTITY_TOKEN_FILE"
VARIABLE_DIRECTORY = "CLOISTER_IDENTITY_DIRECTORY"
_OTHER = re.compile(r"[^A-Za-z0-9.-]+")
_NAME_CHARACTERS = 80


def tokens_step(identity: Identity, box: str, user: str, uid: int, *, mode: int = 0o400) -> IdentityTokens | None:
    """Return the step that keeps a run's tokens, or None for a policy that names no audience."""
    if not identity.audiences:
        return None
    others = tuple(dict.fromkeys(name for name in identity.audiences if name != OWN))
    from cloister.identity.principal import user_segment  # for runs with audiences only

    return IdentityTokens(
        directory=f"{box}/{DIRECTORY}",
        user=user_segment(user, uid),
        audiences=others,
        lifetime_s=int(parse_duration(identity.lifetime)),
        mode=mode,
    )


def variables(identity: Identity) -> dict[str, str]:
    """Return what tells the agent where its tokens are."""
    if not identity.audiences:
        return {}
    return {VARIABLE: f"{BOX}/{DIRECTORY}/{file_name(OWN)}", VARIABLE_DIRECTORY: f"{BOX}/{DIRECTORY}"}


def file_name(audience: str) -> str:
    """Return the file of an audience: itself where it is plain, else made plain and told apart by a digest."""
    plain = _OTHER.sub("-", audience.removeprefix("https://")).strip(".-")[:_NAME_CHARACTERS]
    if plain == audience:
        return f"{plain}.jwt"
    return f"{plain or 'audience'}_{hashlib.sha256(audience.encode()).hexdigest()[:8]}.jwt"
