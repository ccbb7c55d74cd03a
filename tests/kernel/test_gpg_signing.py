"""Commits signed by gpg with a key that stays in the person's own gpg-agent: real gpg outside and inside."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from support.cloister import BASE, User

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]
_PARAMETERS = """\
%no-protection
Key-Type: EDDSA
Key-Curve: ed25519
Key-Usage: cert
Subkey-Type: EDDSA
Subkey-Curve: ed25519
Subkey-Usage: sign
Name-Real: {name}
Name-Email: {name}@example.org
Expire-Date: 0
"""


class Gpg(NamedTuple):
    """A person's GnuPG with two keys, of which the first is named in the policy."""

    user: User
    workspace: Path
    folder: Path
    named: str
    other: str

    def outside(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command of the person."""
        environment = {**self.user.environment, "GNUPGHOME": str(self.folder)}
        return subprocess.run(
            words,
            env=environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            cwd=self.workspace,
        )

    def inside(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run a script in the sandbox."""
        return self.user.run(
            "run", "shell", "--", "/bin/sh", "-c", script, cwd=self.workspace, GNUPGHOME=str(self.folder)
        )

    def events(self) -> list[dict[str, str]]:
        """Return the newest run's events about signatures."""
        newest = max(self.user.state.glob("runs/*/events.jsonl"))
        events = [json.loads(line) for line in newest.read_text().splitlines()]
        return [event for event in events if event["event"] == "signing"]


@pytest.fixture
def gpg(user: User, home: Path, workspace: Path) -> Iterator[Gpg]:
    """Make two keys in a GnuPG home whose path is short enough for a socket."""
    folder = user.runtime / "g"
    folder.mkdir(mode=0o700)
    person = Gpg(user, workspace, folder, "", "")
    for name in ("named", "other"):
        made = person.outside("gpg", "--batch", "--quiet", "--gen-key", stdin=_PARAMETERS.format(name=name))
        assert made.returncode == 0, made.stderr
    keys = [
        next(
            line for line in person.outside("gpg", "--with-colons", "-k", name).stdout.splitlines() if line[:3] == "fpr"
        )
        for name in ("named", "other")
    ]
    person = person._replace(named=keys[0].split(":")[9], other=keys[1].split(":")[9])
    (home / ".gitconfig").write_text(
        f"[user]\n\tname = named\n\temail = named@example.org\n\tsigningkey = {person.named}\n"
        "[commit]\n\tgpgsign = true\n"
    )
    user.write_policy(BASE + f'[agents.shell.credentials.sign]\nkeys = ["gpg:{person.named}"]\nuses = ["gpg"]\n')
    yield person
    person.outside("gpgconf", "--kill", "all")
    user.close()


def test_commits_are_signed_by_gpg_as_the_person_does(gpg: Gpg) -> None:
    """A plain `git commit` inside is signed, git outside verifies it, and the record says by which key.

    The person's gpg-agent need not run before.
    """
    gpg.outside("gpgconf", "--kill", "gpg-agent")
    done = gpg.inside("echo x > x; git add x; git commit -q -m signed; git verify-commit HEAD")
    verified = gpg.outside("git", "verify-commit", "--raw", "HEAD")

    assert done.returncode == 0, done.stderr
    assert f" {gpg.named}\n" in verified.stderr
    assert "GOODSIG" in verified.stderr
    assert [(event["verdict"], event["use"], event["key"], event["credential"]) for event in gpg.events()] == [
        ("allow", "gpg", gpg.named, "sign")
    ]


def test_the_key_cannot_be_used_otherwise(gpg: Gpg) -> None:
    """Other keys, exports, deletion, new keys, passphrases do not exist inside; the person's keys stay as they are."""
    before = gpg.outside("gpg", "--with-colons", "--with-keygrip", "-K").stdout
    grips = [line.split(":")[9] for line in before.splitlines() if line.startswith("grp")]
    talk = "; ".join(
        [
            f"echo 'KEYINFO {grip}'; echo 'SIGKEY {grip}'; echo 'DELETE_KEY --force {grip}'; echo 'PASSWD {grip}'"
            for grip in grips
        ]
        + [
            "echo 'EXPORT_KEY --openpgp " + grips[1] + "'",
            "echo PKDECRYPT",
            "echo GENKEY",
            "echo KILLAGENT",
            "echo BYE",
        ]
    )
    done = gpg.inside(
        "gpg --batch --export-secret-keys; gpg --batch --yes -u other -bsa README; gpg --batch -K other; "
        f'( {talk} ) | /usr/bin/python3 -c "{_TALK}"; ls README.asc'
    )
    after = gpg.outside("gpg", "--with-colons", "--with-keygrip", "-K").stdout

    assert "PRIVATE" not in done.stdout
    assert "README.asc" not in done.stdout
    assert after == before
    assert done.stdout.count("Forbidden") >= 5
    assert gpg.outside("gpg-connect-agent", "GETINFO pid", "/bye").stdout.startswith("D ")
    assert {"request-refused", "key-not-named"} <= {event["reason"] for event in gpg.events()}
    assert "signed" not in {event["reason"] for event in gpg.events()}


def test_no_private_key_is_inside(gpg: Gpg) -> None:
    """The private parts lie in files of the person's GnuPG home, and none of their names or bytes is visible inside."""
    files = sorted((gpg.folder / "private-keys-v1.d").iterdir())
    assert len(files) == 4
    done = gpg.inside(
        f"ls -R ~/.gnupg; ls {gpg.folder}; find / -name 'private-keys-v1.d' -not -path '/proc/*' 2>/dev/null"
    )

    assert "private-keys-v1.d" not in done.stdout
    assert "pubring.gpg" in done.stdout


def test_a_key_that_gpg_does_not_know_stops_the_start(gpg: Gpg) -> None:
    """The refusal names the key and what to type."""
    gpg.user.write_policy(BASE + f'[agents.shell.credentials.sign]\nkeys = ["gpg:{"0" * 40}"]\nuses = ["gpg"]\n')
    done = gpg.inside("true")

    assert done.returncode == 125
    assert "key-missing" in done.stderr
    assert "gpg --list-keys" in done.stderr


_TALK = (
    "import socket,sys;"
    "s=socket.socket(socket.AF_UNIX);s.connect('/run/cloister/box/gpg-agent.sock');"
    "s.sendall(sys.stdin.buffer.read());s.shutdown(1);"
    "print(b''.join(iter(lambda:s.recv(4096),b'')).decode())"
)
