"""What a start finds out about a person's keys: from files that only they can write, and from nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cloister.credentials.ssh_keys import fingerprint, write_public
from cloister.credentials.ssh_known_hosts import Place
from cloister.errors import CloisterError
from cloister.host.gpg_keys import GpgKeys
from cloister.policy.model import Agent, Credential
from cloister.runs.signing import look_up_keys, refuse_missing
from cloister.runs.signing_model import Situation, Sources
from support.ssh_material import make_ed25519

pytestmark = pytest.mark.kernel
KEY, OTHER, HOST = make_ed25519(10), make_ed25519(11), make_ed25519(1)
NAME = fingerprint(KEY.blob)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with one public key and one known host."""
    folder = tmp_path / "home/.ssh"
    folder.mkdir(parents=True)
    write(folder / "work.pub", f"{write_public(KEY.blob)} alice@laptop\n")
    write(folder / "known_hosts", f"git.example.org {write_public(HOST.blob)}\n")
    return tmp_path / "home"


def write(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file with a mode that the umask does not change."""
    path.write_text(text)
    path.chmod(mode)


def situation(home: Path, **changed: object) -> Situation:
    """Return a start of the person whose home it is."""
    facts: dict[str, object] = {
        "agent": "claude", "uid": os.getuid(), "home": str(home), "writable": (str(home.parent / "project"),),
        "environment": {"SSH_AUTH_SOCK": "", "GNUPGHOME": ""}, "git": {}, "gpg_keys": GpgKeys(),
    }  # fmt: skip
    return Situation(**{**facts, **changed})  # type: ignore[arg-type]


def agent(*keys: str, uses: tuple[str, ...] = ("ssh", "git"), hosts: tuple[str, ...] = ("git.example.org",)) -> Agent:
    """Return an agent with one credential."""
    return Agent(credentials={"forge": Credential(keys=keys, uses=uses, hosts=hosts)})  # type: ignore[arg-type]


@pytest.mark.parametrize("spelling", [NAME, "~/.ssh/work.pub", "{home}/.ssh/work.pub", ".ssh/work.pub"])
def test_a_key_is_found_in_every_spelling(home: Path, spelling: str) -> None:
    """By fingerprint or by file: the same key, its host's keys, and git's settings with the key in full."""
    signing, sources = look_up_keys(agent(spelling.format(home=home)), situation(home))

    assert sources.ring is not None
    assert [grant.key for grant in sources.ring.grants] == [NAME]
    assert sources.ring.hosts[Place("git.example.org")].keys == {HOST.blob}
    assert dict(signing.git) == {"gpg.format": "ssh", "user.signingkey": f"key::{write_public(KEY.blob)}"}
    assert {file.name for file in signing.files} == {"ssh_config", "known_hosts"}
    assert "alice" not in repr(signing)


def test_a_key_that_is_in_no_file_is_asked_of_the_agent_by_git(home: Path) -> None:
    """A fingerprint alone is enough: git takes the first key that the filter lists."""
    signing, _ = look_up_keys(agent(fingerprint(OTHER.blob)), situation(home))

    assert ("gpg.ssh.defaultkeycommand", "ssh-add -L") in signing.git


def test_the_persons_own_signing_key_is_taken_where_it_is_named(home: Path) -> None:
    """Of two named keys git uses the one that the person's git uses, and signs unasked where that does."""
    git = {"gpg.format": "ssh", "user.signingkey": "~/.ssh/work", "commit.gpgsign": "true"}
    signing, _ = look_up_keys(agent(fingerprint(OTHER.blob), NAME), situation(home, git=git))

    assert dict(signing.git)["user.signingkey"] == f"key::{write_public(KEY.blob)}"
    assert dict(signing.git)["commit.gpgsign"] == "true"


def test_keys_for_commits_alone_need_no_host(home: Path) -> None:
    """`uses = ["git"]` changes nothing about ssh."""
    signing, sources = look_up_keys(agent(NAME, uses=("git",), hosts=()), situation(home))

    assert signing.files == ()
    assert sources.ring is not None
    assert sources.ring.hosts == {}


def test_a_policy_without_keys_costs_nothing(home: Path) -> None:
    """No file is looked at, no variable set."""
    signing, _ = look_up_keys(Agent(), situation(home / "nowhere"))

    assert (signing.agents, signing.files, signing.environment, signing.git) == ((), (), {}, ())


@pytest.mark.parametrize(
    ("change", "reference"),
    [
        (lambda home: write(home / ".ssh/work.pub", "no key\n"), "key-unreadable"),
        (lambda home: write(home / ".ssh/work.pub", "ssh-ed25519 AAAA\n"), "key-unreadable"),
        (lambda home: write(home / ".ssh/work.pub", write_public(KEY.blob), 0o622), "key-untrusted"),
        (lambda home: (home / ".ssh/work.pub").unlink(), "key-missing"),
        (lambda home: ((home / ".ssh/work.pub").unlink(), os.mkfifo(home / ".ssh/work.pub")), "key-unreadable"),
        (lambda home: (home / ".ssh/known_hosts").chmod(0o666), "key-untrusted"),
        (lambda home: write(home / ".ssh/known_hosts", f"other.example.org {write_public(HOST.blob)}\n"),
         "host-key-unknown"),
        (lambda home: write(home / ".ssh/known_hosts", "@revoked * x\n"), "known-hosts-unreadable"),
        (lambda home: (home / ".ssh/known_hosts").unlink(), "host-key-unknown"),
    ],
)  # fmt: skip
def test_what_cannot_be_trusted_stops_the_start(home: Path, change, reference: str) -> None:
    """Broken, missing, written by others, no file at all: the error has a name and something to type."""
    change(home)
    with pytest.raises(CloisterError) as caught:
        look_up_keys(agent("~/.ssh/work.pub"), situation(home))

    assert caught.value.reference == reference
    assert caught.value.remedy


@pytest.mark.parametrize("link", [False, True])
def test_an_agent_cannot_say_which_key_is_meant(home: Path, link: bool) -> None:
    """A .pub file in a workspace, also behind a link, is the agent's to change: it names nothing."""
    planted = home.parent / "project/planted.pub"
    planted.parent.mkdir()
    write(planted, write_public(OTHER.blob))
    if link:
        (home / ".ssh/work.pub").unlink()
        (home / ".ssh/work.pub").symlink_to(planted)
    with pytest.raises(CloisterError) as caught:
        look_up_keys(agent("~/.ssh/work.pub" if link else str(planted)), situation(home))

    assert caught.value.reference == "key-untrusted"


@pytest.mark.parametrize("value", ["", "relative", "/nowhere", "file", "nul\0"])
def test_a_start_needs_an_agent(home: Path, tmp_path: Path, value: str) -> None:
    """SSH_AUTH_SOCK that is not set, no path, nothing, or no socket is refused; without keys it does not matter."""
    write(tmp_path / "file", "")
    path = str(tmp_path / "file") if value == "file" else value
    _, sources = look_up_keys(agent(NAME), situation(home, environment={"SSH_AUTH_SOCK": path}))
    with pytest.raises(CloisterError) as caught:
        refuse_missing(sources)

    assert caught.value.reference == "ssh-agent-missing"
    refuse_missing(Sources())
