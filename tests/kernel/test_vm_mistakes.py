"""What beginners do wrong with microVMs: each is one clear error with something to type. Nothing boots."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from support.cloister import BASE, User

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]
VM = f'{BASE}isolation = "microvm"\n[agents.shell.microvm]\n'

POLICIES = {
    'image = "dve"': ("image-missing", ".microvm.image", "cloister image list"),
    "": ("image-missing", ".microvm", "cloister image build dev"),
    'memory = "64M"': ("microvm-memory", ".microvm.memory", "memory ="),
    "cpus = 99": ("microvm-cpus", ".microvm.cpus", "cpus ="),
    "ports = [80, 80]": ("microvm-ports", ".microvm.ports", "ports = [80]"),
    '[agents.shell.egress]\nmode = "internet"': ("microvm-internet", ".egress.mode", "mode ="),
    '[agents.shell.filesystem]\nread = ["/srv/data"]': ("microvm-path", ".filesystem.read", "carry"),
    "[agents.shell.unit]\nio_weight = 10": ("policy-not-enforceable", ".unit", 'isolation = "unit"'),
}


def test_check_says_what_a_start_would_refuse(user: User, workspace: Path) -> None:
    """With the key's place and a remedy, and nothing is called unknown that exists."""
    user.run("ps", cwd=workspace)
    for table, (reference, key, remedy) in POLICIES.items():
        user.write_policy(f"{VM}{table}\n")
        report = json.loads(user.run("check", "--json", cwd=workspace).stdout)
        run = user.inside("true", cwd=workspace)
        warning = next(one for one in report["warnings"] if key.split(".")[1] in one["where"])

        assert report["problems"] == []
        assert "will not start" in warning["message"]
        assert remedy in warning["remedy"], table
        assert run.returncode == 125
        assert f"[{reference}]" in run.stderr, table
        assert "\n  try: " in run.stderr
    user.close()


def test_a_table_without_its_isolation_is_told_as_that(user: User, workspace: Path) -> None:
    """`[agents.X.microvm]` alone does nothing: said, with the line that is missing."""
    user.write_policy(f"{BASE}[agents.shell.microvm]\ncpus = 2\n")
    checked = user.run("check", cwd=workspace)
    listed = user.run("agents", cwd=workspace)
    user.write_policy(f'{BASE}isolation = "microvm"\n')
    named = user.run("agents", cwd=workspace)
    user.close()

    assert 'isolation = "microvm", or remove' in checked.stdout
    assert "refused: microvm" in listed.stdout
    assert "refused" not in named.stdout


def test_a_guest_larger_than_the_host_is_refused(user: User, workspace: Path) -> None:
    """Before anything starts, and with a size that fits: QEMU's own words would say less."""
    from cloister.errors import UnsupportedError
    from cloister.runs.prepare_vm import refuse_larger

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    refuse_larger(memory, memory)
    with pytest.raises(UnsupportedError) as caught:
        refuse_larger(memory + 1, memory)
    user.write_policy(f'{VM}memory = "9000T"\n')
    run = user.inside("true", cwd=workspace)
    user.close()

    assert (caught.value.reference, caught.value.remedy.startswith("memory =")) == ("microvm-memory", True)
    assert "[microvm-memory]" in run.stderr


WORDS = {
    ("vm", "lst"): (64, "did you mean list?"),
    ("vm", "stop", "shell"): (64, "cloister vm start shell"),
    ("vm", "logs", "shell"): (64, "cloister vm start shell"),
    ("vm", "exec", "shell", "--", "true"): (125, "cloister vm start shell"),
    ("vm", "cp", "shell:/x", "."): (64, "cloister vm start shell"),
    ("vm", "cp", "a", "b"): (64, "cloister vm cp last:"),
    ("vm", "start", "shel"): (125, "one of plain, shell"),
    ("vm", "start", "plain"): (125, 'isolation = "microvm"'),
    ("vm", "restore", "before"): (64, "cloister vm snapshots"),
    ("vm", "rm", "before"): (64, "cloister vm snapshots"),
    ("vm", "warm", "nobody"): (64, "cloister agents"),
    ("image", "build", "dve"): (64, "cloister image build dev"),
    ("image", "build", "./none.toml"): (64, "cloister image list --recipes"),
    ("image", "inspect", "dev"): (64, "cloister image build dev"),
    ("image", "verify", "mine"): (64, "./mine.toml"),
    ("image", "renew", "dev"): (64, "cloister image build dev"),
}


def test_a_verb_that_cannot_says_what_would(user: User, workspace: Path) -> None:
    """One error, one remedy; no key, image or run comes of it."""
    user.write_policy(f'{VM}[agents.plain]\npreset = "shell"\n')
    for words, (code, remedy) in WORDS.items():
        done = user.run(*words, cwd=workspace)

        assert done.returncode == code, (words, done.stderr)
        assert remedy in done.stderr.partition("\n  try: ")[2], (words, done.stderr)
        assert "Traceback" not in done.stderr
    made = [user.state / "runs", user.home / ".config/cloister/image-key", user.home / ".local/share/cloister/images"]
    left = [path for path in made if path.exists() and any(path.iterdir())]
    user.close()

    assert left == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('schema = 1\nname = "Mine!"\npackges = ["git"]\n', "the recipe has 2 mistakes [recipe-invalid]"),
        ('schema = 1\nname = "mine"\npackages = ["git"\n', "[recipe-unreadable]"),
    ],
)
def test_a_recipe_is_not_called_a_policy(user: User, workspace: Path, text: str, said: str) -> None:
    """Its mistakes come all at once, by its own name."""
    (workspace / "mine.toml").write_text(text)
    done = user.run("image", "build", "./mine.toml", cwd=workspace)
    user.close()

    assert done.returncode == 78
    assert said in done.stderr
    assert "policy" not in done.stderr


def test_nothing_to_list_is_no_error(user: User, workspace: Path) -> None:
    """People read a sentence, programs an empty list."""
    for words in (("vm", "list", "--all"), ("vm", "stats"), ("vm", "snapshots"), ("image", "list")):
        text = user.run(*words, cwd=workspace)
        data = user.run(*words, "--json", cwd=workspace)

        assert (text.returncode, data.returncode, json.loads(data.stdout)) == (0, 0, []), words
        assert text.stdout.strip()
    user.close()
