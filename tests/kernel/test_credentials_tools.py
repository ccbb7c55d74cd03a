"""Real tools that need a token: git, npm, pip, and what signs for AWS, each as it is installed."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import botocore
import pytest
from botocore.auth import S3SigV4Auth, SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from support.bound import HOST, SECRET, credential, keep, policy
from support.cloister import User
from support.git_server import GitServer
from support.secure_server import Answer, SecureServer, Sent, TestAuthority

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]
DENIED = Answer(401, b"who are you?", {"www-authenticate": 'Basic realm="x"'})


def basic(user: str) -> str:
    """Return the field in which a server gets the secret beside a user's name."""
    return "Basic " + base64.b64encode(f"{user}:{SECRET}".encode()).decode()


# --- git ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["", "GIT_TOKEN"])
def test_git_clones_and_pushes(
    user: User, workspace: Path, authority: TestAuthority, tmp_path: Path, variable: str
) -> None:
    """Clone and push over https work with a token that is nowhere inside, asked for by no prompt."""
    files = authority.certificate(HOST)
    with GitServer(tmp_path / "git", files, basic("x-access-token")) as server:
        table = credential(keep(user), server.port, scheme="git", env=variable)
        user.write_policy(policy(server.port, table))
        address = f"https://{HOST}:{server.port}/demo.git"
        script = (
            f"cd /tmp && git clone -q {address} demo && cd demo && cat README && echo more > MORE && git add MORE"
            " && git commit -q -m second && git push -q origin main && git fetch -q && git status -sb; cat .git/config"
        )
        done = user.inside(script, cwd=workspace)

        assert "from the server" in done.stdout, done
        assert "## main...origin/main" in done.stdout
        assert server.log() == ["second", "first"]
    assert SECRET not in done.stdout + done.stderr
    assert "x-access-token" not in done.stdout
    user.close()


def test_git_with_the_placeholder_in_its_address(
    user: User, workspace: Path, authority: TestAuthority, tmp_path: Path
) -> None:
    """The way CI does it, token in the address, works with the placeholder; a wrong secret is the server's 401."""
    with GitServer(tmp_path / "git", authority.certificate(HOST), basic("oauth2")) as server:
        table = credential(keep(user), server.port, scheme="git", env="GIT_TOKEN", user="oauth2")
        user.write_policy(policy(server.port, table))
        script = f"cd /tmp && git clone -q https://ci:$GIT_TOKEN@{HOST}:{server.port}/demo.git && cat demo/README"
        good = user.inside(script, cwd=workspace)
        keep(user, "another-value")
        bad = user.inside(f"export GIT_TERMINAL_PROMPT=0; {script}", cwd=workspace)

    assert good.stdout == "from the server\n", good
    assert bad.returncode == 128
    assert "another-value" not in bad.stderr
    user.close()


# --- npm and pip --------------------------------------------------------------------------------


def npm_registry(authorization: str, port: Callable[[], int]) -> Callable[[Sent], Answer]:
    """Return a registry with one package, for whoever sends the right field."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, text in (
            ("package.json", '{"name": "demo", "version": "1.0.0"}'),
            ("index.js", "module.exports = 42\n"),
        ):
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    data = packed.getvalue()
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()

    def answer(sent: Sent) -> Answer:
        if sent.headers.get("authorization") != authorization:
            return DENIED
        if sent.path.endswith(".tgz"):
            return Answer(body=data)
        dist = {"tarball": f"https://{HOST}:{port()}/demo/-/demo-1.0.0.tgz", "integrity": integrity}
        version = {"name": "demo", "version": "1.0.0", "dist": dist}
        body = {"name": "demo", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}}
        return Answer(body=json.dumps(body).encode(), headers={"content-type": "application/json"})

    return answer


@pytest.mark.parametrize("variable", ["", "NPM_TOKEN"])
def test_npm_installs_from_a_private_registry(user: User, workspace: Path, server: SecureServer, variable: str) -> None:
    """`npm install` gets package and tarball; with a variable also by the `.npmrc` people already have."""
    server.answer = npm_registry(f"Bearer {SECRET}", lambda: server.port)
    user.write_policy(policy(server.port, credential(keep(user), server.port, scheme="npm", env=variable)))
    npmrc = f"//{HOST}:{server.port}/:_authToken=${{NPM_TOKEN}}" if variable else ""
    script = (
        f"mkdir /tmp/n && cd /tmp/n && echo '{{}}' > package.json && echo '{npmrc}' > .npmrc"
        f" && npm install --no-audit --no-fund --fetch-retries=0 --registry https://{HOST}:{server.port}/ demo"
        " && node -e 'console.log(require(\"demo\"))'"
    )
    done = user.inside(script, cwd=workspace)

    assert done.stdout.endswith("42\n"), done
    assert {sent.headers["authorization"] for sent in server.sent} == {f"Bearer {SECRET}"}
    user.close()


def index(authorization: str) -> Callable[[Sent], Answer]:
    """Return a simple index with one wheel, for whoever sends the right field (PEP 503)."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("demo.py", "ANSWER = 42\n")
        archive.writestr("demo-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n")
        archive.writestr("demo-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("demo-1.0.dist-info/RECORD", "")
    data = packed.getvalue()

    def answer(sent: Sent) -> Answer:
        if sent.headers.get("authorization") != authorization:
            return DENIED
        if sent.path.endswith(".whl"):
            return Answer(body=data)
        link = f'<a href="/files/demo-1.0-py3-none-any.whl#sha256={hashlib.sha256(data).hexdigest()}">demo</a>'
        return Answer(body=link.encode(), headers={"content-type": "text/html"})

    return answer


def test_pip_installs_from_a_private_index(user: User, workspace: Path, server: SecureServer) -> None:
    """`pip install` gets index and wheel with a token that it never sees."""
    server.answer = index(basic("__token__"))
    user.write_policy(policy(server.port, credential(keep(user), server.port, scheme="pip", env="")))
    script = (
        "python3 -m venv /tmp/v && cd /tmp && v/bin/pip install -q --disable-pip-version-check --no-input --retries 0"
        f" -i https://{HOST}:{server.port}/simple demo && v/bin/python -c 'import demo; print(demo.ANSWER)'"
    )
    done = user.inside(script, cwd=workspace)

    assert done.stdout.endswith("42\n"), done
    assert {sent.headers["authorization"] for sent in server.sent} == {basic("__token__")}
    user.close()


# --- AWS ----------------------------------------------------------------------------------------

KEY_ID, SECRET_KEY = "AKIDEXAMPLE", "made-up/Secret+Key0123456789abcdef"


def signed(sent: Sent, token: str = "") -> bool:
    """Say whether a request carries the signature that botocore makes with the real pair."""
    fields = dict(part.strip().split("=", 1) for part in sent.headers["authorization"].split(" ", 1)[1].split(","))
    key_id, _, region, service, _ = fields["Credential"].split("/")
    kept = {name: sent.headers[name] for name in fields["SignedHeaders"].split(";")}
    request = AWSRequest(sent.method, f"https://{kept['host']}{sent.path}", data=sent.body, headers=kept)
    request.context["timestamp"] = kept["x-amz-date"]
    pair = Credentials(KEY_ID, SECRET_KEY, token or None)
    auth = (S3SigV4Auth if service == "s3" else SigV4Auth)(pair, service, region)
    wanted = auth.signature(auth.string_to_sign(request, auth.canonical_request(request)), request)
    return (fields["Signature"], key_id) == (wanted, KEY_ID) and sent.headers.get("x-amz-security-token", "") == token


def aws(server: SecureServer, token: str = "") -> Callable[[Sent], Answer]:
    """Return a service that checks signatures."""
    del server
    return lambda sent: Answer() if signed(sent, token) else Answer(403, b"SignatureDoesNotMatch")


@pytest.mark.parametrize("token", ["", "session/token=="])
def test_curl_signs_with_the_placeholder_pair(user: User, workspace: Path, server: SecureServer, token: str) -> None:
    """A real client's signature is made anew with the real pair: with a body, a query, and a session token."""
    server.answer = aws(server, token)
    secret = ":".join(filter(None, (KEY_ID, SECRET_KEY, token)))
    user.write_policy(policy(server.port, credential(keep(user, secret), server.port, scheme="sigv4", env="")))
    sign = '-w "\\n" -sS -m 20 --user "$AWS_ACCESS_KEY_ID:$AWS_SECRET_ACCESS_KEY" --aws-sigv4'
    at = f"https://{HOST}:{server.port}"
    script = (
        f'curl {sign} "aws:amz:eu-central-1:sts" -d "Action=GetCallerIdentity&Version=2011-06-15" {at}/;'
        f'curl {sign} "aws:amz:us-east-1:lambda" "{at}/functions?Marker=1";'
        f'curl -sS -m 20 "{at}/?X-Amz-Credential=$AWS_ACCESS_KEY_ID&X-Amz-Signature=0";'
        "env"
    )
    done = user.inside(script, cwd=workspace)

    assert done.stdout.startswith("hello\nhello\n"), done
    assert len(server.sent) == 2
    assert "signature-unsupported" in done.stdout
    assert "AWS_ACCESS_KEY_ID=AKIA" in done.stdout
    assert not [part for part in (KEY_ID, SECRET_KEY, *filter(None, [token])) if part in done.stdout]
    user.close()


BOTO = """
import botocore.session, os
session = botocore.session.get_session()
make = lambda name: session.create_client(name, region_name="eu-west-1", endpoint_url=os.environ["AT"])
s3 = make("s3")
s3.put_object(Bucket="bucket", Key="a b/ä+c", Body=b"content" * 1000)
print(s3.get_object(Bucket="bucket", Key="x?y")["Body"].read())
s3.list_objects_v2(Bucket="bucket", Prefix="a/b c", Delimiter="/")
print(make("sqs").meta.service_model.signing_name)
make("sqs").list_queues(QueueNamePrefix="q")
"""


def test_botocore_works_unmodified(user: User, workspace: Path, server: SecureServer) -> None:
    """AWS's own library, with the placeholder pair: uploads, odd names, lists, and services that sign their body."""
    packages = Path(botocore.__file__).parent.parent
    at = f"https://{HOST}:{server.port}"
    listing = b"<ListBucketResult></ListBucketResult>"
    check = aws(server)

    def answer(sent: Sent) -> Answer:
        bodies = {"PUT": b"", "POST": b"{}", "GET": listing if "list-type" in sent.path else b"hello"}
        return check(sent)._replace(body=bodies[sent.method]) if check(sent).status == 200 else check(sent)

    server.answer = answer
    read = f'[agents.shell.filesystem]\nread = ["{packages}"]\n'
    table = credential(keep(user, f"{KEY_ID}:{SECRET_KEY}"), server.port, scheme="sigv4", env="")
    user.write_policy(
        policy(server.port, table, more=f'environment = {{ AT = "{at}", PYTHONPATH = "{packages}" }}\n{read}')
    )
    (workspace / "boto.py").write_text(BOTO)
    done = user.inside("python3 boto.py", cwd=workspace)

    assert done.stdout == "b'hello'\nsqs\n", done
    assert [sent.method for sent in server.sent] == ["PUT", "GET", "GET", "POST"]
    user.close()
