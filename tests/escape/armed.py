"""An agent whose policy has everything that a secret stands behind, and the servers and agents of keys it needs.

Credentials of several schemes at two servers, a login, models of both protocols, identity tokens, keys of an ssh-agent
and of a gpg-agent: so the cases about them have something to attack.
"""

from __future__ import annotations

import contextlib
import json
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cloister.credentials import logins as kept_logins
from cloister.credentials.oauth_answers import read_token_answer
from cloister.host.logins import Shelf
from support.bound import HOST, credential, keep
from support.cloister import BASE, User
from support.fake_model import FakeModel
from support.fake_oauth import FakeOauth, make_certificate
from support.secure_server import SecureServer
from support.ssh_server import SshAgent, fingerprint, make_key

SECRETS = {
    "bearer": "canary-Bearer-4f5e6d7c8b9a",
    "basic": "canary-Basic-0a1b2c3d4e5f",
    "put-in": "canary-PutIn-99aa88bb77cc",
    "signer": "AKIDEXAMPLE:canary-Signer-0123456789abcdefghij",
    "provider": "canary-Provider-5a6b7c8d9e",
}
_GPG_KEY = """\
%no-protection
Key-Type: EDDSA
Key-Curve: ed25519
Key-Usage: sign
Name-Real: armed
Name-Email: armed@example.org
Expire-Date: 0
"""


class Armed(NamedTuple):
    """The agent `shell` of a user, and what it talks to."""

    user: User
    servers: tuple[SecureServer, SecureServer]
    model: FakeModel
    oauth: FakeOauth

    @property
    def secrets(self) -> list[str]:
        """Everything that must appear nowhere."""
        tokens = [token for family in self.oauth.families for token in (*family.access, family.refresh)]
        return [part for secret in SECRETS.values() for part in secret.split(":") if "canary" in part] + tokens

    def cases(self, *words: str) -> dict[str, dict[str, str]]:
        """Run `cloister prove` with further words; return results by case."""
        done = self.user.run("prove", "shell", "--json", *words, cwd=self.user.home / "src/project", timeout_s=110)
        assert done.returncode in (0, 1, 69), done.stderr
        assert not [secret for secret in self.secrets if secret in done.stdout + done.stderr]
        return {case["id"]: case for case in json.loads(done.stdout)["cases"]}


@contextlib.contextmanager
def armed(user: User, folder: Path) -> Iterator[Armed]:
    """Start everything and write the policy."""
    folder.mkdir()
    authority, certificate = make_certificate(folder, HOST)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    key = make_key(folder / "keys/work")
    gpg_home = user.runtime / "g"
    gpg_home.mkdir(mode=0o700)
    user.environment |= {"SSL_CERT_FILE": str(authority), "GNUPGHOME": str(gpg_home)}
    with (
        SecureServer(context) as one,
        SecureServer(context) as two,
        FakeModel() as model,
        FakeOauth() as oauth,
        SshAgent(user.runtime, [key]) as agent,
    ):
        oauth.also_over_tls(certificate)
        user.environment["SSH_AUTH_SOCK"] = str(agent.socket)
        made = Armed(user, (one, two), model, oauth)
        _log_in(made)
        user.write_policy(_policy(made, fingerprint(key), _gpg_key(user)))
        yield made
        subprocess.run(["gpgconf", "--kill", "all"], env=user.environment, check=False, timeout=20)
        user.close()


def _log_in(armed: Armed) -> None:
    now = time.time()
    endpoint = f"https://{HOST}:{armed.oauth.tls_port}/token"
    login = armed.oauth.login(hosts=(HOST,), token_url=endpoint)
    granted = read_token_answer(200, json.dumps(armed.oauth.grant()).encode(), now)
    with Shelf(str(armed.user.state / "logins")).held("work") as held:
        held.write(kept_logins.encode(kept_logins.new("work", "test", login, granted, now)))


def _gpg_key(user: User) -> str:
    """Make a key that signs; return its fingerprint."""

    def gpg(*words: str, stdin: str = "") -> str:
        done = subprocess.run(
            ["gpg", "--batch", "--quiet", *words], env=user.environment, input=stdin, capture_output=True, text=True,
            timeout=30, check=True,
        )  # fmt: skip
        return done.stdout

    gpg("--gen-key", stdin=_GPG_KEY)
    listed = gpg("--with-colons", "-k", "armed").splitlines()
    return next(line.split(":")[9] for line in listed if line.startswith("fpr"))


def _policy(armed: Armed, ssh_key: str, gpg_key: str) -> str:
    user, (one, two), oauth_port = armed.user, armed.servers, armed.oauth.tls_port
    at = {name: keep(user, secret, name) for name, secret in SECRETS.items()}
    allowed = [f"{HOST}:{port}" for port in (one.port, two.port, oauth_port)]
    tables = (
        credential(at["bearer"], one.port, name="bearer", env="TOKEN"),
        credential(at["basic"], two.port, name="basic", env="OTHER", scheme="basic", user="me"),
        credential(at["put-in"], one.port, name="put-in", env="", scheme="header", header="X-Put-In"),
        credential(at["signer"], two.port, name="signer", env="", scheme="sigv4", paths=["/aws"]),
        credential("login:work", oauth_port, name="work", env="LOGIN_TOKEN"),
    )
    providers = "".join(
        f'[providers.{name}]\nprotocol = "{protocol}"\nbase_url = "{armed.model.url}"\nkey = "{at["provider"]}"\n'
        for name, protocol in (("claude", "anthropic"), ("gpt", "openai-responses"))
    )
    return (
        f"{BASE}{providers}[agents.shell.egress]\nallow = {json.dumps(allowed)}\n"
        '[agents.shell.llm]\nproviders = ["claude", "gpt"]\nmodels = ["claude-*", "gpt-*"]\n'
        "requests_per_minute = 1000\n"
        '[agents.shell.identity]\naudiences = ["vault"]\n'
        f'[agents.shell.credentials.forge]\nkeys = ["{ssh_key}"]\nuses = ["git"]\n'
        f'[agents.shell.credentials.sign]\nkeys = ["gpg:{gpg_key}"]\nuses = ["gpg"]\n' + "".join(tables)
    )
