"""Renew or end the person's login from inside."""

from cloister.prove.inside.clients import must_be_refused, placeholders, secure, send
from cloister.prove.inside.support import Box, opens

ID = "login-endpoint"
TITLE = "Renew, use up or end the person's login from inside"
PROMISE = "P-208"
CLASSES = (65, 67)
EXPECT = "the token endpoint is refused from inside, and the login's file is not there"
SHAPE = "any"
IF_POLICY = ("logins",)
LIMIT_S = 20.0


def attack(box: Box) -> None:
    """With a placeholder as the refresh token, as products renew; then the store of logins."""
    tokens = [*placeholders(box).values(), "made-up"]
    for host, port, path in box.fact("token_places"):
        authority = host if port == 443 else f"{host}:{port}"
        for token in tokens:
            form = f"grant_type=refresh_token&client_id=x&refresh_token={token}".encode()
            fields = {"Content-Type": "application/x-www-form-urlencoded"}
            connection, answer = secure(host, port)
            if connection is not None:
                answer = send(connection, "POST", path, authority, fields, form)
            must_be_refused(box, f"POST {host}:{port}{path}", answer)
    for path in map(str, box.fact("secret_stores")):
        if path.endswith("/logins"):
            box.refused(path, "ENOENT EACCES", opens, path)
            box.refused(f"{path}/work.json", "ENOENT EACCES", opens, f"{path}/work.json")
