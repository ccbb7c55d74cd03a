"""A machine of the tests as the place of measurements: Cloister set up in it, alice with a project, words to ask."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Self

from support import machines
from support.machines import PYTHON, Machine

HERE = Path(__file__).parent
PLACE = "/srv/measure"
AGENT = "sh"
CARRIED_FILES, CARRIED_BYTES, MANY_FILES = 1000, 4096, 20_000
POLICY = f"""\
schema = 1

[agents.{AGENT}]
preset = "shell"
isolation = "unit"
command = ["/bin/sh"]

[agents.carries]
preset = "shell"
isolation = "unit"
command = ["/bin/sh"]
carry = ["~/.claude"]

[users.alice]
agents = ["{AGENT}", "carries"]
roots = ["~/src"]
"""
MAKE_FILES = """
mkdir -p ~/src/project ~/src/large && git init -q ~/src/project && git init -q ~/src/large
mkdir -p ~/.claude/projects && cd ~/.claude/projects
for n in $(seq {carried}); do head -c {size} /dev/urandom > $n.jsonl; done
mkdir ~/src/large/files && cd ~/src/large/files && seq {many} | xargs touch
"""


class Rig:
    """One machine, booted and set up."""

    def __init__(self, suite: str, scratch: Path, wheel: Path) -> None:
        """Boot it; raises MachineError when it does not come up."""
        base = machines.image(suite) / "root"
        (scratch / "machine").mkdir(parents=True)
        layers = [machines.install(base, wheel, scratch / "layer"), base]
        self.machine = Machine(suite, layers, scratch / "machine", {PLACE: HERE})
        self.machine.write("/etc/cloister/cloister.toml", POLICY)
        self.machine.run(["cloister", "setup", "--yes"], timeout=120)
        files = MAKE_FILES.format(carried=CARRIED_FILES, size=CARRIED_BYTES, many=MANY_FILES)
        self.machine.run(["sh", "-c", files], user="alice", timeout=120)
        self.name = f"Debian {'12' if suite == 'bookworm' else '13'}, systemd {self.machine.version}"

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the machine."""
        self.machine.close()

    def ask(self, name: str, **asked: Any) -> Any:
        """Have `inside.py` measure something in the machine; return what it tells."""
        command = [PYTHON, "-I", f"{PLACE}/inside.py", name]
        told = self.machine.run(command, input=json.dumps(asked), timeout=900)
        return json.loads(told.stdout)

    def detach(self, seconds: int, agent: str = AGENT) -> str:
        """Start a run of alice's in the background; return its id."""
        command = ["cloister", "run", "-d", agent, "--", "/bin/sleep", str(seconds)]
        return str(self.machine.run(command, user="alice", cwd="/home/alice/src/project").stdout).strip()

    def stop(self, run: str) -> None:
        """End a run."""
        self.machine.run(["cloister", "stop", run], user="alice", cwd="/home/alice/src/project")

    def properties(self) -> list[tuple[str, str]]:
        """Return the properties of a run's unit, as hostd has written its plan down."""
        run = self.detach(30)
        record = json.loads(self.machine.read(f"/var/lib/cloister/hostd/runs/{run}.json"))
        self.stop(run)
        unit = next(step["unit"] for step in record["plan"]["steps"] if step.get("unit"))
        return [(name, value) for name, value in unit["properties"] if name != "CollectMode"]


def scratch() -> tempfile.TemporaryDirectory[str]:
    """Return a folder for machines, removed in the end."""
    return tempfile.TemporaryDirectory(prefix="cloister-units-")
