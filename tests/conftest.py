"""What every test can ask for, and the two rules every test obeys: pure folders stay pure, skips are not silent.

Fixtures are named for the life of a run: a `home` and a `workspace`, a `fake_model` to talk to,
the real `agents`, and `nothing_left` afterwards. Fixtures of one folder belong into that
folder's conftest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from support import leftovers, skips
from support.cloister import User
from support.fake_model import FakeModel
from support.guard import Guard
from support.homes import make_home, make_workspace
from support.machines import SUITES

TESTS = Path(__file__).parent
NEEDS_ROOT = TESTS / "systemd"
PASS = os.environ.get("CLOISTER_TEST_PASS", "")
PURE = tuple(TESTS / name for name in ("unit", "golden", "fuzz"))
APART = (
    *PURE,
    *(TESTS / name for name in ("style", "microvm", "agents", "escape", "kernel/relay", "kernel/workspace")),
)
"""Of the pass `user-apart`."""
IN_CI = os.environ.get("CI", "").lower() not in {"", "0", "false"}
GUARD = Guard()
_SHOWN = 8000
"""Characters of a failed test's broker."""

# The same examples every time, and no deadline: shared machines are slow at times. `thorough` looks for new ones.
hypothesis.settings.register_profile("steady", deadline=None, database=None, derandomize=True)
hypothesis.settings.register_profile("thorough", deadline=None, database=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


def pytest_configure(config: pytest.Config) -> None:
    """Connect the guard, and read the list of allowed skips (a broken list stops everything)."""
    GUARD.install()
    config.stash[ALLOWED] = skips.load(TESTS / "allowed_skips.toml")


ALLOWED = pytest.StashKey[tuple[skips.AllowedSkip, ...]]()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even read what has no test for this pass: that takes seconds."""
    del config
    if not PASS or collection_path.suffix != ".py" or not collection_path.name.startswith("test_"):
        return None
    of_root = NEEDS_ROOT in collection_path.parents
    if PASS.startswith("user"):
        return True if of_root or _apart(collection_path) else None
    return None if of_root or "mark.root" in collection_path.read_text(encoding="utf-8") else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of this pass; `tools/test` runs all passes, at the same time, when it is root."""
    if PASS:
        config.hook.pytest_deselected(items=[item for item in items if not _in_pass(item)])
        items[:] = [item for item in items if _in_pass(item)]


def _apart(path: Path) -> bool:
    """Whether a file belongs to the other part of the ordinary user's tests."""
    pure = any(folder in path.parents for folder in APART)
    return {"user-apart": not pure, "user-rest": pure}.get(PASS, False)


def _in_pass(item: pytest.Item) -> bool:
    """Whether a test belongs to this pass, or part of one.

    `user`: `user-apart`, what is pure, what boots guests, real agents, attacks, relay and workspace; `user-rest`.
    `root`: `root-alone`; a suite's machines.
    """
    of_root = item.get_closest_marker("root") is not None
    if not of_root or PASS in {"user", "root"}:
        return of_root == (not PASS.startswith("user")) and not _apart(item.path)
    if NEEDS_ROOT not in item.path.parents:
        return PASS == "root-alone"  # some look for what is left of root's processes anywhere
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    suite = parameters.get("suite", SUITES[0])
    return f"root-{suite}" == PASS


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Turn a skip into a failure, in CI; show of a failed test what its broker had to say."""
    report = yield
    if report.failed and report.when == "call":
        for value in getattr(item, "funcargs", {}).values():
            log = Path(value.state, "broker.log") if isinstance(value, User) else None
            if log and log.is_file():
                report.sections.append(("broker.log", log.read_text(encoding="utf-8", errors="replace")[-_SHOWN:]))
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        _judge(item.config, item.nodeid, report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """Do the same for modules that skip themselves."""
    report = yield
    if IN_CI and report.skipped:
        _judge(collector.config, collector.nodeid, report)
    return report


def _judge(config: pytest.Config, node: str, report: pytest.TestReport | pytest.CollectReport) -> None:
    """Mark a report as failed when its skip is not in the list."""
    if skips.is_allowed(node, config.stash[ALLOWED]):
        return
    why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = f"skipped in CI, and not in tests/allowed_skips.toml: {why}"


@pytest.fixture(autouse=True)
def _untouched_machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests below unit, golden and fuzz may not touch the machine."""
    if not any(folder in request.path.parents for folder in PURE):
        yield
        return
    with GUARD.watching(tmp_path_factory.getbasetemp()):
        yield


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a home directory such as a developer's, with canaries where secrets would be."""
    return make_home(tmp_path / "home")


@pytest.fixture
def workspace(home: Path) -> Path:
    """Return a git repository with one commit, below the home."""
    return make_workspace(home / "src" / "project")


@pytest.fixture
def fake_model() -> Iterator[FakeModel]:
    """A model provider on loopback that answers FAKE-OK; set `script` for other answers."""
    with FakeModel() as model:
        yield model


@pytest.fixture(scope="session")
def agents_bin() -> Path:
    """Return the folder with the real agents, which `tools/agents` installs."""
    folder = os.environ.get("CLOISTER_TEST_AGENTS", "")
    if not folder:
        pytest.skip("CLOISTER_TEST_AGENTS is not set; `make test` sets it")
    return Path(folder) / "bin"


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fail when a test leaves a process, a mount, a socket or a runtime file of this user behind."""
    before = leftovers.take()
    yield
    leftovers.check(before)
