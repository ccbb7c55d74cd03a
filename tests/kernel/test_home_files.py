"""What of a home is found for an agent: files, settings, variables; and what is not taken."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from cloister.errors import PolicyError
from cloister.policy.model import Agent, Preset
from cloister.runs.file_variables import FileVariables, of_home, of_policy
from cloister.runs.home_files import home_files, merge_settings

pytestmark = pytest.mark.kernel

PRESET = Preset(
    schema=1, state=(".pi/agent",), secrets=(".pi/agent/auth.json", ".pi/agent/.env"),
    settings=".pi/agent/settings.json", environment_file=".pi/agent/.env",
)  # fmt: skip
AGENT = Agent(carry=(".pi/agent/settings.json", "~/.pi/agent/skills", ".gitconfig"))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home that keeps Pi's configuration in two places."""
    for place, mark in ((".pi/agent", "usual"), ("dotfiles/pi", "moved")):
        folder = tmp_path / place
        (folder / "skills").mkdir(parents=True)
        (folder / "settings.json").write_text(f'{{"mark": "{mark}"}}')
        (folder / "auth.json").write_text("made-up")
        (folder / ".env").write_text(f"MARK={mark}\nPATH=/evil\nMY_API_KEY=made-up\n")
    (tmp_path / ".gitconfig").write_text("")
    return tmp_path


def test_a_user_may_keep_the_configuration_elsewhere(home: Path) -> None:
    """`[users.NAME] config` moves where things are looked for, secrets included, and not where they are inside."""
    for config, place in (("", ".pi/agent"), ("~/dotfiles/pi", "dotfiles/pi"), ("dotfiles/pi/", "dotfiles/pi")):
        found = home_files(AGENT, PRESET, str(home), config=config)
        assert {path.name: path.source for path in found.carried} == {
            ".pi/agent/settings.json": f"{home}/{place}/settings.json",
            ".pi/agent/skills": f"{home}/{place}/skills",
            ".gitconfig": f"{home}/.gitconfig",
        }
        assert found.settings == f"{home}/{place}/settings.json"
        assert found.environment == f"{place}/.env"
        assert {f"{home}/.pi/agent/auth.json", f"{home}/{place}/auth.json"} <= set(found.secrets)


def test_a_carried_directory_hides_the_secrets_in_it(home: Path) -> None:
    """Also where it lies elsewhere: the masks are where the agent would look."""
    for config in ("", "dotfiles/pi"):
        found = home_files(Agent(carry=(".pi/agent",)), PRESET, str(home), config=config)
        assert found.masks == ((".pi/agent/auth.json", "file"), (".pi/agent/.env", "file"))


def test_broken_settings_are_said_aloud(home: Path) -> None:
    """Flaw PF13: the person reads which file it is and what counts instead."""
    agent = msgspec.structs.replace(AGENT, settings={"managed": 1})
    found = home_files(agent, PRESET, str(home))
    assert merge_settings(agent, PRESET, found.settings)[1] == ()
    Path(found.settings).write_text("{ oops")
    data, notices = merge_settings(agent, PRESET, found.settings)
    assert b'"managed": 1' in data
    assert notices == ("~/.pi/agent/settings.json is not JSON: only the policy's settings count [file-not-read]",)
    Path(found.settings).unlink()
    os.mkfifo(found.settings)
    assert "only the policy's" in merge_settings(agent, PRESET, found.settings)[1][0]


def test_a_homes_variables_come_without_what_is_secret_or_loads_code(home: Path) -> None:
    """Flaws PF9 and PF10: what stays out is named; the rest counts."""
    values, notices = of_home(str(home), ".pi/agent/.env", AGENT, ())
    assert values == {"MARK": "usual"}
    assert len(notices) == 1
    assert "MY_API_KEY, PATH" in notices[0]
    assert "made-up" not in notices[0]


def test_a_homes_file_that_leads_elsewhere_or_is_none_brings_nothing(home: Path, tmp_path: Path) -> None:
    """Flaw PF3: `.env` as a link; to the workspace, where the agent writes, nothing of it counts. No hang on a FIFO."""
    env = home / ".pi/agent/.env"
    (tmp_path / "work").mkdir()
    (tmp_path / "work/.env").write_text("PLANTED=1")
    env.unlink()
    assert of_home(str(home), ".pi/agent/.env", AGENT, ()) == ({}, ())
    env.symlink_to(tmp_path / "work/.env")
    assert of_home(str(home), ".pi/agent/.env", AGENT, (str(tmp_path / "work"),)) == ({}, ())
    assert of_home(str(home), ".pi/agent/.env", AGENT, ())[0] == {"PLANTED": "1"}
    env.unlink()
    os.mkfifo(env)
    assert "was not read: it is no file" in of_home(str(home), ".pi/agent/.env", AGENT, ())[1][0]
    env.unlink()
    env.write_text("A='never closed\n")
    assert "line 1" in of_home(str(home), ".pi/agent/.env", AGENT, ())[1][0]


def filed(home: Path, *files: str, **more: object) -> dict[str, str]:
    """Return the variables of policy files."""
    agent = Agent(environment_files=files)
    return of_policy(agent, "pi", home=str(home), owners=(os.getuid(),), forbidden=(), **more)


def test_files_of_the_policy_count_in_their_order(home: Path) -> None:
    """Later ones win; each is read by itself."""
    (home / "a.env").write_text("A=1\nB=1\n")
    (home / "b.env").write_text("B=2\n")
    assert filed(home, str(home / "a.env"), "~/b.env") == {"A": "1", "B": "2"}
    assert filed(home, "~/b.env", "~/a.env") == {"A": "1", "B": "1"}


@pytest.mark.parametrize(
    ("text", "said"),
    [("NODE_OPTIONS=--require=/x\n", "no file sets it"), ("MY_TOKEN=made-up\n", "secret"), ("A=1\nB\n", "line 2"),
     ("A=sk-" + "a" * 30 + "\n", "secret"), ("HOME=/x\n", "Cloister sets"), (b"A=\xff\n", "UTF-8")],
)  # fmt: skip
def test_a_mistake_in_a_file_of_the_policy_starts_nothing(home: Path, text: str | bytes, said: str) -> None:
    """It is named with its file and what to do; its value is not."""
    (home / "a.env").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PolicyError) as caught:
        filed(home, "~/a.env")
    assert caught.value.reference == "environment-file"
    assert said in caught.value.message
    assert "made-up" not in str(caught.value.problems)


def test_a_file_that_others_could_write_is_not_the_policys(home: Path) -> None:
    """Missing, writable by others, somebody else's, where the agent writes: each is refused."""
    file = home / "a.env"
    with pytest.raises(PolicyError, match="cannot be opened"):
        filed(home, "~/a.env")
    file.write_text("A=1")
    file.chmod(0o666)
    with pytest.raises(PolicyError, match="others than its owner"):
        filed(home, "~/a.env")
    file.chmod(0o644)
    agent = Agent(environment_files=("~/a.env",))
    with pytest.raises(PolicyError, match="another user"):
        of_policy(agent, "pi", home=str(home), owners=(999_999,), forbidden=())
    with pytest.raises(PolicyError, match="where the agent may write"):
        of_policy(agent, "pi", home=str(home), owners=(os.getuid(),), forbidden=(str(home),))
    with pytest.raises(PolicyError, match="nobody's home"):
        of_policy(agent, "pi", home="", owners=(os.getuid(),), forbidden=())
    assert filed(home, "~/a.env") == {"A": "1"}


def test_no_value_is_shown(home: Path) -> None:
    """What holds values shows none."""
    assert "usual" not in repr(FileVariables(*of_home(str(home), ".pi/agent/.env", AGENT, ())[:1], {}))
