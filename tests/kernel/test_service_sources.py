"""Reading what root declared for gateways: whole and plain, or refused with a reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cloister.errors import UnsupportedError
from cloister.host.gateway_manager import round_trip
from cloister.host.service_sources import read_tree
from cloister.runs.paths import Paths
from cloister.runs.policies import PolicyFiles
from support.fake_model import FakeModel

pytestmark = pytest.mark.kernel


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A good directory with a document and a script."""
    top = tmp_path / "source"
    (top / "scripts").mkdir(parents=True)
    (top / "SKILL.md").write_text("skill\n", encoding="utf-8")
    (top / "scripts/run.sh").write_text("#!/bin/sh\n", encoding="utf-8")
    (top / "scripts/run.sh").chmod(0o755)
    for path in (top, top / "scripts"):
        path.chmod(0o755)
    (top / "SKILL.md").chmod(0o644)
    return top


def read(path: Path) -> dict[str, tuple[str, bool]]:
    """Return what is read, in short."""
    return {name: (file.text, file.executable) for name, file in read_tree(str(path), owner=os.getuid()).items()}


def test_a_tree_is_read_whole(source: Path) -> None:
    """Text and executable bits arrive; what git keeps does not."""
    (source / ".git").mkdir(mode=0o755)
    (source / ".git/config").write_text("x", encoding="utf-8")
    assert read(source) == {"SKILL.md": ("skill\n", False), "scripts/run.sh": ("#!/bin/sh\n", True)}


@pytest.mark.parametrize("target", ["/etc/shadow", "/etc", "SKILL.md"])
def test_links_bring_nothing_in(source: Path, target: str) -> None:
    """A link in a declared directory would show an agent any file of root's: it is refused, wherever it leads."""
    (source / "scripts/link").symlink_to(target)
    with pytest.raises(ValueError, match="links are not followed"):
        read(source)


def test_a_link_on_the_way_is_refused(source: Path) -> None:
    """Who can change a link on the way would choose the directory."""
    way = source.parent / "way"
    way.symlink_to(source)
    with pytest.raises(OSError):  # noqa: PT011  # ELOOP or ENOTDIR, by the kernel
        read(way)


@pytest.mark.parametrize("name", [".", "SKILL.md", "scripts"])
def test_what_others_could_change_is_refused(source: Path, name: str) -> None:
    """Whoever can write a document steers the agent."""
    path = source / name
    path.chmod(path.stat().st_mode | 0o022)
    with pytest.raises(ValueError, match="can be written by others"):
        read(source)


def test_what_is_no_text_file_is_refused(source: Path) -> None:
    """Neither bytes nor pipes: a pipe would also hang root."""
    (source / "image").write_bytes(b"\xff\xfe")
    (source / "image").chmod(0o644)
    with pytest.raises(ValueError, match="no UTF-8"):
        read(source)
    (source / "image").unlink()
    os.mkfifo(source / "pipe", 0o644)
    with pytest.raises(ValueError, match="neither a file nor a directory"):
        read(source)


def test_ready_is_an_answer() -> None:
    """A gateway that answers through its model is ready; one that is not there, or says something else, is not."""
    with FakeModel() as model:
        assert round_trip(model.port, "secret", 10) == ""
        port = model.port
    assert "does not answer" in round_trip(port, "secret", 2)


def test_gateways_are_not_a_users_to_declare(tmp_path: Path) -> None:
    """A user's own policy with `[services]` is refused aloud; nothing would start them."""
    table = '[agents.a]\ncommand = ["true"]\nisolation = "unit"\n[services.s]\nagent = "a"\n'
    own = tmp_path / "own.toml"
    for text, refused in (("schema = 1\n" + table, True), ('schema = 1\n[agents.a]\ncommand = ["true"]\n', False)):
        own.write_text(text, encoding="utf-8")
        own.chmod(0o600)
        paths = Paths(str(tmp_path), str(tmp_path), str(tmp_path), str(tmp_path))
        files = PolicyFiles(paths, os.getuid(), policy=str(own), system=str(tmp_path / "none"))
        if refused:
            with pytest.raises(UnsupportedError, match="system's policy"):
                files.refuse_ignored()
        else:
            files.refuse_ignored()
