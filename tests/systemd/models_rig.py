"""A machine on which real agents run as system users, with models, a bound secret and tokens: what its tests share.

The provider is `support.fake_model`, the host of the bound secret a web server with TLS; both are on the machine's
loopback. Keys are files of root's, made up, which only systemd hands to the system's broker.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

from support.machines import AGENTS, PYTHON, TESTS, Machine
from support.model_inside import ModelInside

KEY = "made-up-provider-key-4f8d2c"
SECRET = "made-up-bound-secret-91be07"  # made up
KEY_FILE = "/etc/cloister/keys/provider"
SECRET_FILE = "/etc/cloister/keys/bound"  # a path
PLANTED = "planted-4f8d2c"
SKIPPED = ("/proc", "/sys", "/usr", "/dev")
"""Not searched inside: what the host installed, and the kernel's own (processes are looked at apart)."""
POLICY = """\
schema = 1

[providers.one]
base_url = "{url}"
key = "file:{key}"

[providers.two]
base_url = "{url}/v1"
protocol = "openai"
key = "file:{key}"

[agents.claude]
preset = "claude"
isolation = "unit"
command = ["{agents}/bin/claude", "--dangerously-skip-permissions", "-p"]
llm = {{ providers = ["one"], models = ["claude-*"] }}

[agents.pi]
preset = "pi"
isolation = "unit"
command = ["{agents}/bin/pi", "-p"]
llm = {{ providers = ["two"], models = ["fake-1"] }}

[agents.sh]
isolation = "unit"
command = ["/bin/bash"]
llm = {{ providers = ["one"], tokens_per_day = 300 }}
pass_environment = ["CARRIED"]

[agents.bound]
isolation = "unit"
command = ["/bin/bash"]
identity = {{ audiences = ["https://aud.example"] }}
egress = {{ allow = ["host.cloister.internal:{port}"] }}

[agents.bound.credentials.token]
secret = "file:{secret}"
env = "TOKEN"
inject = {{ host = "host.cloister.internal", port = {port}, scheme = "bearer" }}

[agents.asking]
isolation = "unit"
command = ["/bin/bash"]
egress = {{ mode = "ask" }}

[users.alice]
agents = ["claude", "pi", "sh", "bound", "asking"]
roots = ["~/p"]

[users.bob]
agents = ["claude", "pi", "sh", "bound", "asking"]
roots = ["~/p"]
"""
SERVER = """
import json, sys, time
from pathlib import Path
from support.secure_server import Answer, SecureServer, TestAuthority
folder = Path(sys.argv[1])
log = open(folder / "log", "w", buffering=1)
def answer(sent):
    log.write(json.dumps(sent.headers) + "\\n")
    return Answer()
with SecureServer(TestAuthority(folder).context("host.cloister.internal"), answer) as server:
    print(server.port, flush=True)
    sys.stdin.read()
"""
SEARCH = """
import os, sys
needles = [word[::-1].encode() for word in sys.argv[2:]]  # backwards, so that this is not what is found
skipped = sys.argv[1].split(":")
kernels = {"proc", "sysfs", "cgroup", "cgroup2", "devtmpfs", "debugfs", "tracefs", "securityfs", "bpf"}
skipped += [words[1] for words in map(str.split, open("/proc/self/mounts")) if words[2] in kernels]
def look(path):
    try:
        if not os.path.isfile(path) or os.path.getsize(path) > 50_000_000:
            return
        with open(path, "rb") as file:
            text = file.read()
    except OSError:
        return
    if any(needle in text for needle in needles):
        print("FOUND", path)
for top, folders, files in os.walk("/"):
    folders[:] = [name for name in folders if os.path.join(top, name) not in skipped]
    for name in files:
        look(os.path.join(top, name))
for pid in filter(str.isdigit, os.listdir("/proc")):
    for name in ("environ", "cmdline"):
        try:
            text = open(f"/proc/{pid}/{name}", "rb").read()
        except OSError:
            continue
        if any(needle in text for needle in needles):
            print("FOUND", f"/proc/PID/{name}")
print("SEARCHED")
"""
"""Prints where any of some words is, in files and processes."""


class Models:
    """The machine, its model and its bound host."""

    def __init__(self, machine: Machine) -> None:
        """Install everything, and give alice and bob a project each."""
        self.machine = machine
        self.model = ModelInside(machine, "python3 search.py", say="ALL-DONE")
        machine.run(["mkdir", "-p", "/srv/bound"])
        self._server = machine.popen(
            [PYTHON, "-c", SERVER, "/srv/bound"], cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={"PYTHONPATH": TESTS, "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
        assert self._server.stdout
        self.port = int(self._server.stdout.readline())
        machine.run(["ln", "-sfn", f"{AGENTS}/bin/node", "/usr/local/bin/node"])
        machine.write(KEY_FILE, KEY + "\n", mode=0o600)
        machine.write(SECRET_FILE, SECRET + "\n", mode=0o600)
        trusting = "[Service]\nEnvironment=SSL_CERT_FILE=/etc/ssl/of-the-test.pem\n"
        machine.write("/etc/systemd/system/cloister-proxyd.service.d/test.conf", trusting)
        machine.run(["cp", "/srv/bound/authority.pem", "/etc/ssl/of-the-test.pem"])
        machine.write(
            "/etc/cloister/cloister.toml",
            POLICY.format(url=self.model.url, agents=AGENTS, key=KEY_FILE, secret=SECRET_FILE, port=self.port),
        )
        machine.run(["cloister", "setup", "--yes"], timeout=120)
        words = [word[::-1] for word in (KEY, SECRET, PLANTED)]
        script = f"import sys\nsys.argv[1:] = {[':'.join((*SKIPPED, AGENTS)), *words]!r}\n{SEARCH}"
        for user in ("alice", "bob"):
            machine.run(["sh", "-c", "mkdir -p p/one/.git"], user=user)
            machine.write(f"/home/{user}/p/one/search.py", script, owner=user)

    def close(self) -> None:
        """End model and host."""
        self.model.close()
        self._server.kill()
        self._server.wait()
        for pipe in (self._server.stdin, self._server.stdout):
            if pipe:
                pipe.close()

    def cloister(self, *words: str, user: str = "alice", **options: Any) -> subprocess.CompletedProcess[Any]:
        """Run a user's `cloister` in the user's project, whatever comes of it."""
        options = {"cwd": f"/home/{user}/p/one" if user != "root" else "/root", "check": False, **options}
        return self.machine.run(["cloister", *words], user=user, **options)

    def inside(self, agent: str, script: str, user: str = "alice", **options: Any) -> subprocess.CompletedProcess[Any]:
        """Run a script of bash in a unit."""
        return self.cloister("run", agent, "--", "/bin/bash", "-c", script, user=user, **options)

    def received(self) -> list[dict[str, str]]:
        """Return the header fields of what the bound host got."""
        return [json.loads(line) for line in self.machine.read("/srv/bound/log").splitlines()]

    def usage(self, *words: str) -> dict[str, Any]:
        """Return the system's usage, by key."""
        done = self.machine.run(["cloister", "usage", "--system", "--json", *words])
        return {line["key"]: line for line in json.loads(done.stdout)["lines"]}
