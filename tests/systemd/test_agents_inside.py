"""The real agents in a test machine, without a sandbox: the positive twin of every run of theirs with one."""

import pytest

from support.agents import AGENTS
from support.machines import Machine
from support.model_inside import ModelInside

pytestmark = pytest.mark.agents


@pytest.mark.parametrize("name", ["claude", "pi"])
def test_an_agent_runs_a_command_of_the_fake_models(machine: Machine, agents_inside: str, name: str) -> None:
    """Node and the pinned agents work inside, as a person, and reach the model on the machine's loopback."""
    agent = AGENTS[name]
    with ModelInside(machine, "id -un >by && cat by", say="ALL-DONE") as model:
        setup = agent.setup(model.url)
        for path, text in setup.files.items():
            machine.write(f"/home/bob/{path}", text, owner="bob")
        machine.run(["mkdir", f"/home/bob/{name}"], user="bob")
        done = machine.run(
            agent.command(),
            user="bob",
            cwd=f"/home/bob/{name}",
            env={"PATH": f"{agents_inside}:/usr/bin:/bin", **setup.environment},
        )
        assert "ALL-DONE" in done.stdout
        assert machine.read(f"/home/bob/{name}/by") == "bob\n"
        assert any("bob" in result for result in model.tool_results)
        assert agent.key_header in model.requests[-1]["headers"]


def test_the_model_ends_with_its_block(machine: Machine) -> None:
    """Nothing listens any more, and its log is gone."""
    with ModelInside(machine) as model:
        code = f"import urllib.request; print(urllib.request.urlopen('{model.url}/v1/models').status)"
        assert machine.run(["python3", "-c", code], user="alice").stdout == "200\n"
        assert [request["path"] for request in model.requests] == ["/v1/models"]
    assert "refused" in machine.run(["python3", "-c", code], user="alice", check=False).stderr
    assert not list(machine.path("/srv").glob("model-*"))
