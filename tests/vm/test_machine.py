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

pytestmark = [pytest.mark.kernel, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 900
RUNS = (
    "binary_safe or home_is_empty or environment_is or only_the_proxy or detached or limits_hold or receipt or commit"
)
PASSES = {
    # Name: way to a cgroup, who runs it, and what. The rest of tests/kernel says nothing new on another kernel.
    "limits-in-a-session": ("scope", "in_session", "tests/vm/guest"),
    "limits-as-root": ("scope", "as_root", "tests/vm/guest/test_limits_as_root.py"),
    "limits-in-a-given-cgroup": ("cgroup", "in_cgroup", "tests/vm/guest/test_limits_in_force.py"),
    "runs": ("scope", "in_session", f"tests/kernel/test_run.py -k '{RUNS} or overlay'"),
    "internet": ("scope", "as_root", "tests/kernel/test_internet.py -k 'public or resolve or refused or loopback'"),
}


@pytest.fixture(scope="module")
def came(tmp_path_factory: pytest.TempPathFactory) -> machine.Came:
    """Boot the machine once and have it go through all passes."""
    image = os.environ.get("CLOISTER_TEST_VM", "")
    if not image:
        pytest.skip("CLOISTER_TEST_VM is not set; `make test-all` sets it")
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
    for path in (
        ROOT / "pyproject.toml",
        ROOT / "tests/vm/start",
        *Path(os.environ["CLOISTER_TEST_WHEEL"]).glob("*.whl"),
    ):
        shutil.copy(path, tree)
    lines = [f"pass {name} {way} {who} {shlex.quote(what)}\n" for name, (way, who, what) in PASSES.items()]
    (tree / "passes").write_text("".join(lines), encoding="utf-8")
    return machine.work(Path(image), tree, tmp_path_factory.mktemp("machine"), TIMEOUT_S)


@pytest.mark.timeout(TIMEOUT_S + 60)
@pytest.mark.parametrize("name", PASSES)
def test_the_machine_passes(came: machine.Came, name: str) -> None:
    """On a stock distribution kernel with systemd, real cgroups and a login session, this pass is green."""
    assert came.files.get(f"./{name}") == b"passed\n", came.output
