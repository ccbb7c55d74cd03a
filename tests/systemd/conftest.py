"""Fixtures of the tests in a real systemd: a `machine` for each suite, and `fresh_machine` for what breaks one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from support import machines
from support.machines import Machine
from support.model_inside import ModelInside

Layers = Callable[[str], list[Path]]
MakeMachine = Callable[..., Machine]


CORE = (
    "test_unit_runs.py", "test_unit_properties.py", "test_unit_asked.py",
    "test_prove_unit.py::test_an_attack_on_a_unit_is_denied", "test_prove_unit.py::test_limits_of_a_unit_hold",
    "test_setup.py::test_a_first_setup_installs", "test_setup.py::test_accounts_are_made",
    "test_setup.py::test_what_is_not_granted_any_more", "test_setup.py::test_uninstall",
    "test_setup.py::test_after_a_reboot", "test_systemd_machine.py::test_it_boots",
)  # fmt: skip
"""What runs on further versions of systemd too: that units hold there, and that they come and go."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """All tests of this folder need root, and boot machines; few of them on further versions of systemd."""
    left_out = []
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.root)
            item.add_marker(pytest.mark.systemd)
            suite = item.callspec.params.get("suite") if hasattr(item, "callspec") else None
            if suite in machines.FURTHER and not item.nodeid.rpartition("/")[2].startswith(CORE):
                left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def layers(tmp_path_factory: pytest.TempPathFactory) -> Layers:
    """Return the file systems of a suite, the wheel installed; made when first asked for."""
    wheel = cache(lambda: machines.wheel(tmp_path_factory.mktemp("built")))

    @cache
    def of(suite: str) -> list[Path]:
        if machines.HERE_IT_IS:
            return []
        base = machines.image(suite) / "root"
        return [machines.install(base, wheel(), tmp_path_factory.mktemp(f"layer-{suite}")), base]

    return of


@pytest.fixture(
    scope="session",
    params=[
        *(machines.SUITES[:1] if machines.HERE_IT_IS else machines.SUITES),
        *(pytest.param(suite, marks=pytest.mark.slow) for suite in machines.FURTHER if not machines.HERE_IT_IS),
    ],
)
def suite(request: pytest.FixtureRequest) -> str:
    """Every test that asks for it, or for a machine, runs on Debian 12 and 13; the core on further versions."""
    return str(request.param)


@pytest.fixture(scope="session")
def machine(suite: str, layers: Layers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine that all tests share: use unit names, accounts and folders of your own, and clean up."""
    with Machine(suite, layers(suite), tmp_path_factory.mktemp(f"machine-{suite}")) as machine:
        yield machine


@pytest.fixture
def fresh_machine(
    suite: str, layers: Layers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Machine]]:
    """Return a function that boots a machine of the test's own, for tests that reboot or break it."""
    made: list[Machine] = []

    def make(**options: Any) -> Machine:
        made.append(Machine(suite, layers(suite), tmp_path_factory.mktemp(f"fresh-{suite}"), **options))
        return made[-1]

    yield make
    for machine in made:
        machine.close()


@pytest.fixture
def model_inside(machine: Machine) -> Iterator[ModelInside]:
    """A model provider on the shared machine's loopback that answers FAKE-OK."""
    with ModelInside(machine) as model:
        yield model


@pytest.fixture(scope="session")
def agents_inside(agents_bin: Path) -> str:
    """Return the folder, inside every machine, with node and the real agents of tests/agents."""
    del agents_bin  # that is where they come from; without them the test is skipped, as elsewhere
    return f"{machines.AGENTS}/bin"
