"""The sandbox note: a short text that tells the model its limits before it runs into them.

Models waste calls on what is denied anyway, and look for ways round what they take for a
fault (PEERS section 2, no. 14). The note says what is so, and what to do instead. It holds
nothing that the agent could not find out by itself.
"""

from __future__ import annotations


def sandbox_note(  # noqa: PLR0913  # the facts of a note, each by its name
    *,
    workspace: str,
    egress: tuple[str, ...],
    mode: str,
    overlay: bool,
    credentials: tuple[str, ...] = (),
    keys: tuple[str, ...] = (),
) -> str:
    """Return the note, plain text of a few lines; `credentials` are `VARIABLE for HOST`, `keys` what they can do."""
    reach = {
        "deny": "Network: only through the proxy set in your environment, and only to: "
        + (", ".join(egress) or "nothing")
        + ".",
        "ask": "Network: only through the proxy set in your environment; the user is asked about each new host.",
        "learn": "Network: public hosts through the proxy set in your environment; each one is recorded.",
        "internet": "Network: the public internet; private and local addresses are refused.",
    }[mode]
    changes = " Changes are reviewed by the user before they reach the real files." if overlay else ""
    held = (
        "Secrets: these variables hold placeholders, which become the real secret on the way to their host and are "
        f"worth nothing elsewhere: {'; '.join(credentials)}.\n"
        if credentials
        else ""
    )
    if keys:
        held += f"Keys of the user, which stay outside and work without set-up: {'; '.join(keys)}.\n"
    return (
        "You run inside a Cloister sandbox.\n"
        f"Files: you may write below {workspace}, the home and /tmp; "
        f"the home and /tmp are empty at the next start.{changes}\n"
        "Git hooks, git configuration, editor and agent configuration in the workspace are read-only on purpose.\n"
        f"{reach}\n{held}"
        "A refused connection answers with a reason; http://cloister.internal/ lists what is allowed. "
        "Do not try to work around a refusal: tell the user what you need and why.\n"
    )
