"""Programs of others take our tokens: AWS's own client library, towards a token service that knows the JWKS only."""

import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import botocore.exceptions
import botocore.session
import pytest

from support import jws
from support.cloister import BASE, User

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]

AUDIENCE = "sts.amazonaws.com"
ANSWER = """<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>
<AccessKeyId>AKIAMADEUP</AccessKeyId><SecretAccessKey>made-up</SecretAccessKey><SessionToken>made-up</SessionToken>
<Expiration>2099-01-01T00:00:00Z</Expiration></Credentials></AssumeRoleWithWebIdentityResult>
</AssumeRoleWithWebIdentityResponse>"""


class TokenService(HTTPServer):
    """Gives credentials for a good web identity token, and 403 for any other."""

    jwks: dict[str, Any]
    claims: dict[str, Any] | None = None


class _Handler(BaseHTTPRequestHandler):
    server: TokenService

    def do_POST(self) -> None:
        form = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        claims = jws.read_by_jwks(form["WebIdentityToken"][0], self.server.jwks)
        good = claims is not None and claims["aud"] == AUDIENCE
        self.server.claims = claims if good else None
        self.send_response(200 if good else 403)
        self.end_headers()
        self.wfile.write(ANSWER.encode() if good else b"<ErrorResponse><Error><Code>InvalidIdentityToken</Code>"
                         b"<Message>no</Message></Error></ErrorResponse>")  # fmt: skip

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


@pytest.fixture
def sts() -> Iterator[TokenService]:
    """A token service on loopback."""
    server = TokenService(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("audience", [AUDIENCE, "somebody-else"])
def test_a_real_client_takes_the_file_as_its_web_identity(  # noqa: PLR0913  # fixtures
    user: User, workspace: Path, tmp_path: Path, sts: TokenService, monkeypatch: pytest.MonkeyPatch, audience: str
) -> None:
    """AWS's library reads the token file and gets credentials for it; a token for somebody else gives it none."""
    user.write_policy(BASE + f'\n[agents.shell.identity]\naudiences = ["{audience}"]\n')
    done = user.inside(f"cat $CLOISTER_IDENTITY_DIRECTORY/{audience}.jwt", cwd=workspace)
    sts.jwks = json.loads(user.run("identity", "jwks", cwd=workspace).stdout)
    file = tmp_path / "token"
    file.write_text(done.stdout)
    for name, value in {
        "AWS_WEB_IDENTITY_TOKEN_FILE": str(file), "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/agent",
        "AWS_ENDPOINT_URL_STS": f"http://127.0.0.1:{sts.server_port}", "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path), "AWS_MAX_ATTEMPTS": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    credentials = botocore.session.get_session().get_credentials()

    if audience == AUDIENCE:
        assert credentials.get_frozen_credentials().access_key == "AKIAMADEUP"
        assert sts.claims is not None
        assert "/agent/shell/run/" in sts.claims["sub"]
    else:
        with pytest.raises(botocore.exceptions.ClientError, match="InvalidIdentityToken"):
            credentials.get_frozen_credentials()
    user.close()
