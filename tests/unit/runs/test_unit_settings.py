"""Settings and variables of files in plans of units: what the system's broker makes of the user's part."""

from __future__ import annotations

import json
import tomllib

import pytest

from cloister.errors import UnsupportedError
from cloister.plan.steps import Plan, WriteFile
from cloister.policy.document import read
from cloister.policy.merge import resolve
from cloister.policy.presets import builtin_presets
from cloister.runs.compile_unit import compile_unit
from golden.test_unit_plans import facts

POLICY = """schema = 1
[agents.agent]
preset = "pi"
isolation = "unit"
environment = { A = "policy", B = "policy" }
settings = { managed = 1 }
"""


def plan(text: str = POLICY, **changes: object) -> Plan:
    """Compile the agent."""
    resolved = resolve(read(text.encode(), "cloister.toml"), "agent", presets=builtin_presets())
    return compile_unit(resolved.agent, resolved.preset, resolved.agent.command, (), facts(**changes))


def sources(made: Plan) -> list[tuple[str, str]]:
    """Return where the settings inside come from."""
    assert made.launch.unit is not None
    return [(mount.base, mount.source) for mount in made.launch.unit.mounts if mount.target.endswith("settings.json")]


def test_settings_that_the_users_broker_merged_are_mounted_from_what_it_sent() -> None:
    """The home's own are in them, so they stand in no plan."""
    made = plan(carried=((".pi/agent/settings.json", "file"),))
    assert sources(made) == [("carry", ".pi/agent/settings.json")]


def test_settings_that_it_left_out_are_the_policys_alone() -> None:
    """A user's broker that sends none does not get rid of the owner's."""
    made = plan(carried=())
    assert sources(made) == [("box", "settings.json")]
    (text,) = [step.text for step in made.steps if isinstance(step, WriteFile) and step.path.endswith("/settings.json")]
    assert json.loads(text) == {"managed": 1}


def test_a_product_without_a_file_of_settings_is_refused() -> None:
    """They would reach nobody."""
    with pytest.raises(UnsupportedError) as caught:
        plan(POLICY.replace('"pi"', '"shell"'))
    assert caught.value.reference == "settings-without-file"


def test_a_product_with_toml_has_toml() -> None:
    """The policy's alone as well are in the form that the product reads, under its name."""
    made = plan(POLICY.replace('"pi"', '"codex"').replace("settings = {", "settings = { a = { b = 1 },"))
    assert made.launch.unit is not None
    found = [mount.source for mount in made.launch.unit.mounts if mount.target.endswith(".codex/config.toml")]
    assert found == ["settings.toml"]
    (text,) = [step.text for step in made.steps if isinstance(step, WriteFile) and step.path.endswith("/settings.toml")]
    assert tomllib.loads(text) == {"managed": 1, "a": {"b": 1}}


def test_models_that_the_users_broker_merged_are_mounted_from_what_it_sent() -> None:
    """Two files at one place would be one too many; where it sent none, the policy's stand alone."""

    def models(**changes: object) -> list[str]:
        unit = plan(protocols=("anthropic",), models=("m",), **changes).launch.unit
        assert unit is not None
        return [mount.base for mount in unit.mounts if mount.target.endswith("models.json")]

    assert models(carried=((".pi/agent/models.json", "file"),)) == ["carry"]
    assert models() == ["box"]


def test_variables_of_files_stand_in_a_plan_by_name_and_in_their_order() -> None:
    """Those of the home do not replace the policy's, those of the policy's files do, and no value is there."""
    launch = plan(home_names=("A", "C"), filed_names=("B", "D")).launch
    assert launch.environment["A"] == "policy"
    assert "B" not in launch.environment
    assert {"B", "C", "D"} <= set(launch.inherit)
    assert "A" not in launch.inherit
