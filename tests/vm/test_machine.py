"""The tests in the virtual machine (`tests/vm/guest`, and some of `tests/kernel`), started from here: one boot for all.

What runs there is in `start`; what is asked of it in `PASSES`. Each pass is one test here, so
that its failure is seen by name; the guest's whole output is shown with it.
"""

import os
import shlex
import shutil
from pathlib import Path

import machine
import pytest

from support.guest_image import renewed

pytestmark = [pytest.mark.kernel, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 900
GUESTS_S = 1800
RUNS = (
    "binary_safe or home_is_empty or environment_is or only_the_proxy or detached or limits_hold or receipt or commit"
)
LIMITS = "tests/vm/guest/test_limits_in_force.py"
PASSES = {
    # Name: way to a cgroup, who runs it, and what. The rest of tests/kernel says nothing new on another kernel.
    "limits-in-a-session": ("scope", "in_session", f"{LIMITS} tests/vm/guest/test_manager_in_session.py"),
    "limits-as-root": ("scope", "as_root", "tests/vm/guest/test_limits_as_root.py"),
    "limits-in-a-given-cgroup": ("cgroup", "in_cgroup", LIMITS),
    "runs": ("scope", "in_session", f"tests/kernel/test_run.py -k '{RUNS} or overlay'"),
    "internet": ("scope", "as_root", "tests/kernel/test_internet.py -k 'public or resolve or refused or loopback'"),
}
# Guests in a guest are slow: a machine of their own, with the image of the tests.
GUESTS = {
    "microvms-in-a-session": ("scope", "in_session", "tests/vm/guest/test_microvms_in_force.py"),
    "microvms-in-a-given-cgroup": ("cgroup", "in_cgroup", "tests/vm/guest/test_microvms_in_force.py"),
    "microvms-warm": ("scope", "in_session", "tests/vm/guest/test_microvms_warm.py"),
}
# The tests of units, with its systemd as theirs: a host with cgroup v2 only and all controllers.
OF_UNITS = (f"tests/systemd/test_{name}.py" for name in ("units_bounded", "unit_runs", "prove_unit", "unit_properties"))
UNITS = {
    "units": ("host", "as_root", f"{' '.join(OF_UNITS)} -k '(bounded or limit or memory) and not attack and not weak'")
}
SUITES = ("bookworm", "trixie")


def _image(suite: str) -> Path:
    """Return what tools/vm-image made for a suite."""
    for folder in map(Path, filter(None, os.environ.get("CLOISTER_TEST_VM", "").split(":"))):
        if folder.name.startswith(f"vm-{suite}-"):
            return folder
    pytest.skip("CLOISTER_TEST_VM does not name it; `make test-all` sets it")


def _work(
    suite: str, passes: dict[str, tuple[str, str, str]], tree: Path, scratch: Path, timeout_s: float
) -> machine.Came:
    """Boot a machine once and have it go through the passes; `tree` may hold more for it already."""
    image = _image(suite)
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
    for path in (
        ROOT / "pyproject.toml",
        ROOT / "tests/vm/start",
        *Path(os.environ["CLOISTER_TEST_WHEEL"]).glob("*.whl"),
    ):
        shutil.copy(path, tree)
    lines = [f"pass {name} {way} {who} {shlex.quote(what)}\n" for name, (way, who, what) in passes.items()]
    (tree / "passes").write_text("".join(lines), encoding="utf-8")
    return machine.work(image, tree, scratch, timeout_s, virtualizes=(tree / "guest-home").exists())


@pytest.fixture(scope="module")
def came(tmp_path_factory: pytest.TempPathFactory) -> machine.Came:
    """What came of all passes without guests."""
    return _work("bookworm", PASSES, tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("machine"), TIMEOUT_S)


@pytest.fixture(scope="module")
def came_of_guests(tmp_path_factory: pytest.TempPathFactory) -> machine.Came:
    """What came of those with guests."""
    made = os.environ.get("CLOISTER_TEST_GUEST", "")
    if not made:
        pytest.skip("CLOISTER_TEST_GUEST is not set: CLOISTER_TEST_GUEST=$(tools/guest-image)")
    tree = tmp_path_factory.mktemp("tree")
    renewed(made, tmp_path_factory.mktemp("guest")).install(tree / "guest-home")
    return _work("bookworm", GUESTS, tree, tmp_path_factory.mktemp("machine"), GUESTS_S)


@pytest.mark.timeout(TIMEOUT_S + 60)
@pytest.mark.parametrize("name", PASSES)
def test_the_machine_passes(came: machine.Came, name: str) -> None:
    """On a stock distribution kernel with systemd, real cgroups and a login session, this pass is green."""
    assert came.files.get(f"./{name}") == b"passed\n", came.output


@pytest.mark.timeout(GUESTS_S + 120)
@pytest.mark.parametrize("name", GUESTS)
def test_monitors_are_held_in_the_machine(came_of_guests: machine.Came, name: str) -> None:
    """On the same host microVMs run for an ordinary user, their monitors in cgroups whose limits are in force."""
    assert came_of_guests.files.get(f"./{name}") == b"passed\n", came_of_guests.output


@pytest.mark.timeout(TIMEOUT_S + 60)
@pytest.mark.parametrize("suite", SUITES)
def test_units_are_limited_in_the_machine(tmp_path: Path, suite: str) -> None:
    """On a host with cgroup v2 only, limits of units are in force, whichever systemd is PID 1 (252, 257)."""
    (tmp_path / "tree").mkdir()
    came = _work(suite, UNITS, tmp_path / "tree", tmp_path, TIMEOUT_S)

    assert came.files.get("./units") == b"passed\n", came.output
