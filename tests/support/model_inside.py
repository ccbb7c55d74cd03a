"""The fake model provider on the loopback of a test machine, where the machine's own proxies and agents reach it."""

from __future__ import annotations

import json
import subprocess
import tempfile
from types import TracebackType
from typing import Any, Self

from support.machines import PYTHON, TESTS, Machine


class ModelInside:
    """`support.fake_model`, run in a machine as nobody; a context manager.

    Attributes:
        url: its base address, as seen inside.
    """

    def __init__(self, machine: Machine, *run: str, say: str = "FAKE-OK", port: int = 0, pace_s: float = 0) -> None:
        """Start it: it asks the agent to run these commands one by one, and then says something."""
        self._log = tempfile.NamedTemporaryFile(dir=machine.path("/srv"), prefix="model-", suffix=".jsonl")  # noqa: SIM115
        inside = f"/srv/{self._log.name.rpartition('/')[2]}"
        machine.run(["chown", "nobody", inside])
        words = [word for command in run for word in ("--run", command)]
        words += ["--say", say, "--port", str(port), "--pace", str(pace_s), "--log", inside]
        self._process = machine.popen(
            [PYTHON, "-m", "support.fake_model", *words],
            user="nobody",
            cwd="/",
            env={"PYTHONPATH": TESTS, "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout
        self.url = self._process.stdout.readline().decode().strip()
        assert self.url, "the fake model did not start"

    @property
    def requests(self) -> list[dict[str, Any]]:
        """What it was asked, in order: method, path, headers, model, tools, tool results."""
        with open(self._log.name, encoding="utf-8") as log:
            return [json.loads(line) for line in log]

    @property
    def tool_results(self) -> list[str]:
        """What the agent's commands printed, from the request that tells most."""
        return max((request["tool_results"] for request in self.requests), key=len, default=[])

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self.close()
