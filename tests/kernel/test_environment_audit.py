"""The look at the environment before an interactive start: shown when there is something to show, and obeyed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from support.cloister import User
from support.leftovers import take
from support.terminal import Terminal

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]
POLICY = """\
schema = 1

[agents.shell]
preset = "shell"
pass_environment = ["NPM_TOKEN", "ANTHROPIC_API_KEY", "SOME_SETTING", "ABSENT", "COLORTERM"]
"""
SECRETS = {"NPM_TOKEN": "npm-canary-5f3a", "ANTHROPIC_API_KEY": "sk-ant-canary-77", "SOME_SETTING": "plain words"}
QUESTION = "Start? [Y/n] "


def start(user: User, workspace: Path, *options: str, **environment: str) -> Terminal:
    """Start `cloister run shell` on a terminal with further variables."""
    command = user.command("run", *options, "shell", "--", "/bin/sh", "-c", "echo started; echo $SOME_SETTING")
    return Terminal(command, cwd=workspace, env={**user.environment, **environment})


@pytest.fixture
def audited(user: User) -> User:
    """A user whose policy carries variables in."""
    user.write_policy(POLICY)
    return user


def test_it_is_grouped_and_masked(audited: User, workspace: Path) -> None:
    """Secrets are named and never shown, model keys under their own title, plain values as they are; Enter starts."""
    with start(audited, workspace, **SECRETS) as screen:
        seen = screen.answer(QUESTION, "\r")
        rest = screen.until("plain words\r\n")
        assert screen.wait() == 0
        assert screen.restored
    model, others = seen.index("Model keys"), seen.index("Other secrets")
    assert model < seen.index("ANTHROPIC_API_KEY") < others < seen.index("NPM_TOKEN") < seen.index("SOME_SETTING")
    assert "plain words" in seen
    assert "canary" not in seen + rest
    assert "ABSENT" not in seen
    assert "COLORTERM" not in seen
    audited.close()


@pytest.mark.parametrize("key", ["n", "N", "\x04"])
def test_no_starts_nothing(audited: User, workspace: Path, key: str) -> None:
    """`n`, and no answer at all, start nothing: 125, no record, no directory, the terminal as it was."""
    with start(audited, workspace, **SECRETS) as screen:
        screen.answer(QUESTION, key)
        assert screen.wait() == 125
        assert b"not started" in screen.shown
        assert b"started\r\n" not in screen.shown
        assert screen.restored
    assert not audited.records()
    assert not list((audited.runtime / "cloister").glob("runs/*"))
    assert not list(audited.state.glob("runs/*"))
    audited.close()


def test_ctrl_c_starts_nothing(audited: User, workspace: Path) -> None:
    """Ctrl-C at the question is Ctrl-C: 130, and nothing was started."""
    with start(audited, workspace, **SECRETS) as screen:
        screen.answer(QUESTION, "\x03")
        assert screen.wait() == 130
        assert screen.restored
    assert not audited.records()
    audited.close()


def test_hanging_up_at_the_question_starts_nothing(audited: User, workspace: Path) -> None:
    """When the caller dies at the question nothing is started, and the broker forgets it and ends when idle."""
    audited.environment["CLOISTER_BROKER_IDLE_S"] = "0.5"
    with start(audited, workspace, **SECRETS) as screen:
        screen.until(QUESTION)
        screen.process.kill()
        screen.process.wait()
    assert not audited.records()
    pid = audited.broker_pid
    for _ in range(200):
        if pid not in take().processes:
            break
        time.sleep(0.05)
    assert pid not in take().processes
    audited.close()


def test_yes_and_nothing_to_show_do_not_ask(audited: User, workspace: Path) -> None:
    """With `--yes`, with only terminal and language carried in, or with the audit off, it starts at once."""
    with start(audited, workspace, "--yes", **SECRETS) as screen:
        seen = screen.until("plain words\r\n")
        assert screen.wait() == 0
    assert "Start?" not in seen
    with start(audited, workspace, COLORTERM="truecolor", LANG="C.UTF-8") as screen:
        seen = screen.until("started\r\n")
        assert screen.wait() == 0
    assert "Start?" not in seen
    audited.write_policy(POLICY + "environment_audit = false\n")
    with start(audited, workspace, **SECRETS) as screen:
        seen = screen.until("plain words\r\n")
        assert screen.wait() == 0
    assert "Start?" not in seen
    audited.close()


def test_with_pipes_there_is_no_question(audited: User, workspace: Path) -> None:
    """A script cannot be asked: the policy's word counts, and the receipt names each secret that was carried in."""
    done = audited.run("run", "shell", "--", "/bin/sh", "-c", "echo $SOME_SETTING", cwd=workspace, **SECRETS)

    assert done.stdout == "plain words\n"
    assert "NPM_TOKEN" in " ".join(audited.receipts()[-1]["opt_outs"])
    audited.close()


def test_a_variable_named_for_one_run_is_shown_too(user: User, workspace: Path) -> None:
    """`--env NAME` is carried in, so it is shown and asked about as well."""
    user.write_policy('schema = 1\n[agents.shell]\npreset = "shell"\n')
    with start(user, workspace, "--env", "SOME_SETTING", **SECRETS) as screen:
        seen = screen.answer(QUESTION, "y")
        screen.until("plain words\r\n")
        assert screen.wait() == 0
    assert "SOME_SETTING = plain words" in seen
    assert "NPM_TOKEN" not in seen
    user.close()


def test_the_keys_of_a_preset_are_named_as_such(user: User, workspace: Path) -> None:
    """A name that only the preset knows as a model key stands under that title, masked."""
    presets = user.home / ".config/cloister/presets"
    presets.mkdir()
    (presets / "mine.toml").write_text('schema = 1\ncommand = ["sh"]\nkey_environment = ["PRODUCT_ACCESS"]\n')
    (presets / "mine.toml").chmod(0o600)
    user.write_policy('schema = 1\n[agents.shell]\npreset = "mine"\npass_environment = ["PRODUCT_ACCESS"]\n')
    with start(user, workspace, PRODUCT_ACCESS="a-canary") as screen:
        seen = screen.answer(QUESTION, "n")
        assert screen.wait() == 125
    assert seen.index("Model keys") < seen.index("PRODUCT_ACCESS")
    assert "canary" not in seen
    user.close()
