"""Have a secret written down: by errors, refusals and failures."""

import contextlib
import os

from cloister.prove.inside.clients import MODELS, model, placeholders
from cloister.prove.inside.support import Box, CannotRunError

ID = "cred-records"
TITLE = "Have a secret written into a plan, an event, a receipt or a log"
PROMISE = "P-141"
CLASSES = (66,)
EXPECT = "records name credentials and hold none"
FRESH = True
CHECKS = ("records-hold-no-secret",)
IF_POLICY = ("credentials", "models", "identity")


def attack(box: Box) -> None:
    """Refusals and mistakes with every placeholder in them; what all cases left is looked at afterwards."""
    if box.fact("unread_secrets"):
        raise CannotRunError(f"the host cannot look for {', '.join(box.fact('unread_secrets'))}")
    tokens = [*placeholders(box).values(), os.environ.get(str(box.fact("model_key")), "no-key")]
    for token in tokens:
        for target in ("http://cloister-prove.invalid/", f"http://{token}.invalid/", f"/v1/{token}", "*"):
            request = f"GET {target} HTTP/1.1\r\nHost: {token}.invalid\r\nAuthorization: Bearer {token}\r\n\r\n"
            with contextlib.suppress(OSError):
                box.http(request.encode())
    if os.environ.get(str(box.fact("model_key"))):
        for body in (b"{", b"\xff", {"model": tokens[-1]}, {"model": ["x"]}):
            with contextlib.suppress(OSError):
                model("POST", "/v1/messages", {"x-api-key": tokens[-1]}, body)
    box.stopped(f"{len(tokens)} placeholders in errors, also at port {MODELS[1]}")
