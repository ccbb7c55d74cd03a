"""Where a run finds its tokens: names of files, variables, the step of the plan."""

import re

import msgspec
import pytest

from cloister.plan.steps import IdentityTokens
from cloister.policy.model import Identity
from cloister.runs.identity_files import file_name, tokens_step, variables

AUDIENCES = (
    "cloister", "vault", "sts.amazonaws.com", "https://vault.example.org", "https://vault.example.org/",
    "vault.example.org", "http://vault.example.org", "a/b", "a-b", "a_b", "../../etc/passwd", "..", ".hidden", "-rf",
    "/", "x" * 256, "x" * 255, "\u00fc", "\u00df", "ss", "index.json", "index", "CLOISTER", "a\\b", "a:b",
    "spiffe://example.org/x",
)  # fmt: skip


def test_every_audience_has_a_file_of_its_own() -> None:
    """Whatever an audience is called, its file stays in the directory and is no other's."""
    names = [file_name(audience) for audience in AUDIENCES]

    assert len(set(names)) == len(AUDIENCES)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*\.jwt", name), name
        assert len(name) < 128
    assert "index.json" not in names


def test_plain_names_stay_what_they_are() -> None:
    """People write these paths into configuration of other programs."""
    assert file_name("cloister") == "cloister.jwt"
    assert file_name("sts.amazonaws.com") == "sts.amazonaws.com.jwt"
    assert file_name("https://vault.example.org") == "vault.example.org_31f92afa.jwt"


def test_a_policy_without_audiences_has_no_tokens() -> None:
    """No step, no variable: nothing of identity is loaded for such a run, whatever else the table says."""
    for identity in (Identity(), Identity(lifetime="1m")):
        assert tokens_step(identity, "/box", "alice", 1000) is None
        assert variables(identity) == {}


def test_the_step_names_what_the_policy_gives() -> None:
    """Our own audience is always there and not named twice; the life is in seconds."""
    step = tokens_step(Identity(audiences=("vault", "cloister", "vault"), lifetime="5m"), "/box", "CORP\\al", 1000)

    assert step == IdentityTokens(directory="/box/identity", user="uid-1000", audiences=("vault",), lifetime_s=300)
    assert "300 s" in step.describe()
    assert "vault" in step.describe()
    assert msgspec.json.decode(msgspec.json.encode(step), type=IdentityTokens) == step


@pytest.mark.parametrize("name", ["CLOISTER_IDENTITY_TOKEN_FILE", "CLOISTER_IDENTITY_DIRECTORY"])
def test_variables_name_paths_of_the_sandbox(name: str) -> None:
    """Paths as the agent sees them."""
    assert variables(Identity(audiences=("vault",)))[name].startswith("/run/cloister/box/identity")
