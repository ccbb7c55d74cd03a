"""What is recorded about one use of a key in a person's own agent, and about what was refused there.

The row behind `cloister why` and the receipt, for ssh-agent and gpg-agent alike. Values only.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Use = Literal["ssh", "git", "gpg", ""]
MAX_SHOWN = 255


class SigningEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """One signature, or one thing that was not done. Holds no secret: neither do the messages it comes from."""

    verdict: Literal["allow", "deny", "failed"]
    """`failed` is the agent's own no: a key that is not there, a person who did not confirm, an agent that is gone."""
    reason: str
    """In kebab-case; `signed` for a signature."""
    use: Use = ""
    key: str = ""
    """The fingerprint (ssh) or keygrip (gpg)."""
    credential: str = ""
    """The name in the policy."""
    host: str = ""
    user: str = ""
    """The name logged in with."""
    namespace: str = ""
    """What a document's signature is for (PROTOCOL.sshsig)."""
    explanation: str = ""
    remedy: str = ""


def denied(reason: str, explanation: str, remedy: str = "", *, use: Use = "", key: str = "") -> SigningEvent:
    """Return the event of a refusal."""
    return SigningEvent("deny", reason, use=use, key=key, explanation=explanation, remedy=remedy)
