"""A directory that becomes another while it is looked at: refused in words, never a bug of the broker's."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest

from cloister.errors import DeniedError, UsageError
from cloister.host import workspace_probe
from cloister.host.owner import identify
from cloister.runs.paths import Paths
from cloister.runs.workspaces import Workspaces, real_path

pytestmark = pytest.mark.kernel


@pytest.fixture
def link(tmp_path: Path) -> Path:
    """A link to a project."""
    (tmp_path / "project").mkdir()
    (tmp_path / "link").symlink_to("project")
    return tmp_path / "link"


@pytest.fixture
def swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every link be a directory again when it is read, as one that is swapped at the right moment."""

    def gone(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "readlink", gone)


def test_a_quiet_link_is_followed(link: Path) -> None:
    """Without a race a link to a project is its project."""
    paths = Paths(*(str(link.parent / name) for name in ("home", "config", "state", "runtime")))
    assert Workspaces(paths, identify(str(link.parent))).project(str(link)) == str(link.parent / "project")


@pytest.mark.usefixtures("swapped")
def test_a_start_in_a_swapped_directory(link: Path) -> None:
    """The start is refused with a reference and something to do."""
    with pytest.raises(UsageError, match="being replaced") as refused:
        real_path(str(link))
    assert refused.value.reference == "directory-unusable"
    assert refused.value.where == str(link)
    paths = Paths(*(str(link.parent / name) for name in ("home", "config", "state", "runtime")))
    with pytest.raises(UsageError, match="being replaced"):
        Workspaces(paths, identify(str(link.parent))).project(str(link))


@pytest.mark.usefixtures("swapped")
def test_a_look_at_a_swapped_workspace(link: Path) -> None:
    """A workspace that is a link is refused, also where the link is none any more when its target is to be named."""
    with pytest.raises(DeniedError) as refused:
        workspace_probe.probe_workspace(str(link), (), uid=os.getuid(), home=str(link.parent), git_configs=())
    assert refused.value.reference == "workspace-not-directory"
