"""Real OpenClaw gateways as services: two instances, installed by `cloister setup`, against the fake model.

One machine per Debian has both for all tests, since a gateway takes a quarter of a minute to come up.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.machines import AGENTS, PYTHON, TESTS, Machine
from support.model_inside import ModelInside

pytestmark = [pytest.mark.agents, pytest.mark.slow, pytest.mark.timeout(600)]

TOKEN = "gateway-token-0123456789abcdef0123456789"  # made up
PASSWORD = "gateway-password-0123456789"  # made up
BOT = "4455:made-up_token-of-a-bot"  # made up
KEY = "provider-key-0123456789abcdef"
POLICY = """\
schema = 1

[providers.anthropic]
base_url = "{url}"
key = "file:/etc/cloister/keys/anthropic"

[agents.claw]
preset = "openclaw"
isolation = "unit"
command = ["{agents}/bin/openclaw"]

[agents.claw.llm]
providers = ["anthropic"]
models = ["fake-1"]

[agents.claw.egress]
allow = ["host.cloister.internal:{far}"]

[agents.claw.filesystem]
read = ["/etc/cloister-plugins/own"]

[services.home]
agent = "claw"
model.primary = "anthropic/fake-1"
auth.token = "file:/etc/cloister/keys/gateway"
documents.directory = "/etc/cloister-docs"
tools = {{ include = ["ls"], exclude = ["dd"] }}

[[services.home.skills]]
name = "greet"
mode = "inline"
description = "say hello"
body = "Say hello."

[services.home.instances.a.channels.telegram]
enable = true
bot_token = "file:/etc/cloister/keys/telegram"
api_root = "https://host.cloister.internal:{far}"
allow_from = [123456789]

[services.home.instances.a.plugins.notes]
source = "/etc/cloister-plugins/notes"
env.NOTES_KEY = "file:/etc/cloister/keys/notes"
settings = {{ depth = 3 }}

[services.home.instances.a.config_overrides.plugins]
load.paths = ["/etc/cloister-plugins/own"]
entries.own.enabled = true

[services.home.instances.b]
port = 19000
auth = {{ mode = "password", token = "", password = "file:/etc/cloister/keys/password" }}
"""
NOTE = "#!/bin/sh\necho \"key $(cat $NOTES_KEY) $(cat ~/.notes/config.json | tr -d '\\n ')\"\n"
PLUGIN = {
    "notes/plugin.toml": (
        'name = "notes"\nskills = ["skills/note"]\npackages = ["bin"]\nstate_dirs = [".notes"]\n'
        'required_env = ["NOTES_KEY"]\n'
    ),
    "notes/skills/note/SKILL.md": "---\nname: note\ndescription: take notes\n---\nUse note.\n",
    "notes/bin/note": NOTE,
    "own/package.json": json.dumps(
        {"name": "own", "version": "1.0.0", "type": "module", "openclaw": {"extensions": ["./index.js"]}}
    ),
    "own/openclaw.plugin.json": json.dumps({
        "id": "own", "name": "Own", "description": "A tool of the tests", "categories": ["other"],
        "contracts": {"tools": ["own_tool"]}, "activation": {"onStartup": True},
        "configSchema": {"type": "object", "additionalProperties": False},
    }),
    "own/index.js": """\
import { definePluginEntry } from "openclaw/plugin-sdk/plugin-entry";
export default definePluginEntry({
  id: "own", name: "Own", description: "A tool of the tests",
  register(api) {
    api.registerTool({
      name: "own_tool", description: "Echo",
      parameters: { type: "object", properties: { input: { type: "string" } } },
      async execute(_id, params) { return { content: [{ type: "text", text: `Got: ${params.input}` }], details: {} }; },
    });
  },
});
""",
}  # fmt: skip
"""One of ours, with a skill, a program and a secret; and one of OpenClaw's own kind, with a tool for the model."""
UNIT_A, UNIT_B = "cloister-service-home-a.service", "cloister-service-home-b.service"
STATE = "/var/lib/cloister/services/cl-home-a"
ASK = """\
import json, sys, urllib.request
body = json.dumps({"model": "openclaw", "messages": [{"role": "user", "content": "hi"}]}).encode()
head = {"Authorization": "Bearer " + sys.argv[2], "Content-Type": "application/json"}
request = urllib.request.Request(f"http://127.0.0.1:{sys.argv[1]}/v1/chat/completions", body, head)
try:
    print(json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["message"]["content"])
except urllib.error.HTTPError as error:
    print(error.code)
"""


class Gateways:
    """A machine with both gateways up, and the model they talk to."""

    def __init__(self, machine: Machine, model: ModelInside) -> None:
        """Install them."""
        self.machine, self.model = machine, model
        machine.run(["ln", "-sfn", f"{AGENTS}/bin/node", "/usr/local/bin/node"])
        machine.write("/etc/cloister/keys/gateway", TOKEN + "\n", mode=0o600)
        secrets = {"anthropic": KEY, "password": PASSWORD, "telegram": BOT, "notes": "made-up-notes"}
        for name, secret in secrets.items():
            machine.write(f"/etc/cloister/keys/{name}", secret + "\n", mode=0o600)
        for name, text in PLUGIN.items():
            machine.write(f"/etc/cloister-plugins/{name}", text, mode=0o755 if "/bin/" in name else 0o644)
        machine.run(["mkdir", "-p", "/srv/bot"])
        self._bot = machine.popen(
            [PYTHON, "-m", "support.fake_bot_api", "/srv/bot", BOT, "host.cloister.internal"], cwd="/",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={"PYTHONPATH": TESTS, "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
        assert self._bot.stdout
        far = int(self._bot.stdout.readline())
        trusting = "[Service]\nEnvironment=SSL_CERT_FILE=/etc/ssl/of-the-test.pem\n"
        machine.write("/etc/systemd/system/cloister-proxyd.service.d/test.conf", trusting)
        machine.run(["cp", "/srv/bot/authority.pem", "/etc/ssl/of-the-test.pem"])
        for name in ("CLAUDE.md", "SOUL.md", "TOOLS.md"):
            machine.write(f"/etc/cloister-docs/{name}", f"# {name}\ndeclared\n")
        machine.write("/etc/cloister/cloister.toml", POLICY.format(url=model.url, agents=AGENTS, far=far))
        machine.run(["cloister", "setup", "--yes"], timeout=120)

    def ask(self, port: int = 18789, token: str = TOKEN) -> str:
        """Return what a gateway answers to somebody on the machine."""
        return str(self.machine.run(["python3", "-c", ASK, str(port), token], user="alice", timeout=90).stdout).strip()

    def bot_calls(self) -> list[dict[str, Any]]:
        """Return what the Bot API was asked."""
        return [json.loads(line) for line in self.machine.read("/srv/bot/calls").splitlines()]

    def close(self) -> None:
        """End the Bot API."""
        self._bot.kill()
        self._bot.wait()

    def inside(self, script: str, unit: str = UNIT_A) -> Any:
        """Run a shell script as the gateway: its user, its namespaces, after its main process."""
        pid = self.machine.show(unit, "MainPID")
        words = ["nsenter", "--target", pid, "--mount", "--net", "--ipc", "--pid", "--root", "--wd", "--"]
        name = "cl-home-a" if unit == UNIT_A else "cl-home-b"
        uid = self.machine.run(["id", "-u", name]).stdout.strip()
        return self.machine.run(
            [*words, "setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "/bin/sh", "-c", script],
            check=False,
        )


@pytest.fixture(scope="module")
def up(suite: str, layers: Any, agents_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateways]:
    """Both gateways, ready by a round trip through their model."""
    place = tmp_path_factory.mktemp(f"gateways-{suite}")
    with (
        Machine(suite, layers(suite), place, binds={AGENTS: agents_bin.parent}) as machine,
        ModelInside(machine) as model,
    ):
        made = Gateways(machine, model)
        for _ in range(3):  # on a loaded machine its time is over before both are there
            done = machine.run(["cloister", "up", "home"], timeout=240, check=False)
            if done.returncode == 0:
                break
        assert done.returncode == 0, done.stdout + done.stderr + machine.journal(UNIT_A)[-6000:]
        yield made
        made.close()


def test_both_answer_through_their_model(up: Gateways) -> None:
    """Ready is a round trip: the port on the host's loopback, the gateway, our proxy, the provider, and back."""
    assert up.ask() == "FAKE-OK"
    assert up.ask(19000, PASSWORD) == "FAKE-OK"
    assert {request["headers"].get("x-api-key") for request in up.model.requests} == {KEY}


def test_status_shows_ports_and_asks_only_when_told_to(up: Gateways) -> None:
    """`cloister status` names each gateway's port; `--ready`, for root, is one model call each."""
    before = len(up.model.requests)
    told = json.loads(up.machine.run(["cloister", "status", "--json"], user="alice").stdout)["services"]
    assert {line["unit"]: (line["port"], line["ready"]) for line in told} == {UNIT_A: (18789, ""), UNIT_B: (19000, "")}
    assert len(up.model.requests) == before
    denied = up.machine.run(["cloister", "status", "--ready"], user="alice", check=False)
    assert (denied.returncode, "root-needed" in denied.stderr) == (77, True)
    told = json.loads(up.machine.run(["cloister", "status", "--ready", "--json"], timeout=120).stdout)["services"]
    assert {line["ready"] for line in told} == {"yes"}
    assert len(up.model.requests) >= before + 2


def test_a_wrong_token_opens_nothing(up: Gateways) -> None:
    """OF6: the gateway checks the token of its own file, not one that it made up."""
    assert up.ask(token="wrong") == "401"  # made up
    assert up.ask(19000, "wrong") == up.ask(19000, TOKEN) == "401"  # made up


def test_telegram_through_the_proxy(up: Gateways) -> None:
    """OF13: the file of a channel's token is one that OpenClaw takes, and holds a placeholder; it answers."""
    up.machine.path("/srv/bot/inbox").open("a").write("hello from outside\n")
    until = time.monotonic() + 60
    while not (said := [call for call in up.bot_calls() if call["method"] == "sendMessage"]):
        assert time.monotonic() < until, up.machine.journal(UNIT_A)[-5000:]
        time.sleep(0.5)
    assert "FAKE-OK" in str(said[-1]["body"])
    assert str(said[-1]["body"]["chat_id"]) == "123456789"
    assert all(call["good"] for call in up.bot_calls())
    kept = up.inside("cat /run/cloister/services/cl-home-a/secrets/telegram").stdout
    assert kept.startswith("cloister-telegram-")
    assert BOT not in up.inside(f"grep -rs '{BOT}' {STATE} {STATE}.d /run/cloister /tmp; cat /proc/*/environ").stdout
    assert BOT not in up.machine.journal()
    assert BOT not in up.machine.run(["sh", "-c", "cat /var/lib/cloister/proxy/runs/*/*.jsonl"]).stdout


def test_plugins_of_both_kinds(up: Gateways) -> None:
    """Ours brings a skill, a program, settings and a secret's file; OpenClaw's own brings its model a tool."""
    call = json.dumps({"tool": "own_tool", "args": {"input": "x1"}})
    head = ["-H", f"Authorization: Bearer {TOKEN}", "-H", "Content-Type: application/json"]
    invoked = up.machine.run(["curl", "-s", *head, "-d", call, "http://127.0.0.1:18789/tools/invoke"], timeout=60)
    assert "Got: x1" in invoked.stdout, invoked.stdout + up.machine.journal(UNIT_A)[-3000:]
    assert up.inside(f"ls {STATE}/workspace/skills").stdout.split() == ["greet", "note"]
    said = up.inside(
        f"HOME={STATE}/home NOTES_KEY=/run/cloister/services/cl-home-a/secrets/plugin-notes-NOTES_KEY "
        "/etc/cloister-plugins/notes/bin/note"
    ).stdout
    assert said == 'key made-up-notes {"depth":3}\n'
    refused = up.inside("echo x >>/etc/cloister-plugins/own/index.js; echo x >>~/.notes/config.json")
    assert refused.returncode != 0


def test_instances_are_strangers(up: Gateways) -> None:
    """OF10: two users; the state, secrets and sockets of one are not there for the other."""
    users = {up.machine.show(unit, "User") for unit in (UNIT_A, UNIT_B)}
    assert users == {"cl-home-a", "cl-home-b"}
    other = "/var/lib/cloister/services/cl-home-b"
    assert up.inside(f"ls {other} {other}.d; ls /run/cloister/services/cl-home-b/secrets").returncode != 0
    assert up.inside(f"touch {STATE}/home/mine && ls {STATE}.d").returncode == 0


def test_the_configuration_cannot_be_replaced(up: Gateways) -> None:
    """OF8: neither written, nor removed, nor led away from; its own state is writable."""
    tree, config = f"{STATE}.d", f"{STATE}.d/openclaw.json"
    before = up.machine.read(config)
    for attack in (f"echo >{config}", f"rm -f {config}", f"mv {tree} {STATE}/x", f"ln -sfn /tmp/x {config}"):
        assert up.inside(attack).returncode != 0, attack
    assert up.machine.read(config) == before
    assert up.inside(f"echo {{}} >{STATE}/home/.openclaw/openclaw.json").returncode == 0


def test_documents_and_skills_cannot_be_rewritten(up: Gateways) -> None:
    """OF9: what the agent is told at its next start is what was declared; its workspace is its own otherwise."""
    work = f"{STATE}/workspace"
    for attack in (
        f"echo evil >{work}/AGENTS.md", f"rm -f {work}/AGENTS.md", f"mv {work}/AGENTS.md {work}/x",
        f"mv {work}/skills {work}/y", f"mkdir {work}/skills/evil", f"rm -rf {work}/skills/greet",
        f"mv {work} {STATE}/z", f"ln -sfn /tmp/evil {work}/SOUL.md",
    ):  # fmt: skip
        assert up.inside(attack).returncode != 0, attack
    assert up.inside(f"cat {work}/AGENTS.md").stdout == "# CLAUDE.md\ndeclared\n"
    assert up.inside(f"ls {work}/skills").stdout == "greet\nnote\n"
    assert up.inside(f"echo note >{work}/note.md && cat {work}/note.md").stdout == "note\n"


def test_secrets_are_in_no_environment(up: Gateways) -> None:
    """OF5: the gateway and everything it starts have neither its token nor the provider's key in their variables."""
    script = "for pid in $(pgrep -u cl-home-a); do tr '\\0' '\\n' </proc/$pid/environ; done"
    said = up.machine.run(["sh", "-c", script]).stdout
    assert "OPENCLAW_CONFIG_PATH=" in said
    assert TOKEN not in said
    assert KEY not in said
    assert KEY not in up.inside(f"grep -rs {KEY} {STATE} {STATE}.d /run/cloister /tmp").stdout
    assert TOKEN not in up.machine.run(["systemctl", "show", UNIT_A], user="alice").stdout


def test_the_network_is_the_proxy(up: Gateways) -> None:
    """OF11: no interface but loopback, so neither the host's services nor the LAN can be spoken to."""
    port = int(up.model.url.rpartition(":")[2])
    assert up.inside("ls /sys/class/net 2>/dev/null || cut -d: -f1 /proc/net/dev").stdout.split().count("lo") == 1
    script = f"exec 3<>/dev/tcp/127.0.0.1/{port}"
    assert up.inside(f"/bin/bash -c '{script}'").returncode != 0
    assert up.inside("/bin/bash -c 'exec 3<>/dev/tcp/127.0.0.1/3128'").returncode == 0


def test_an_excluded_tool_cannot_be_run(up: Gateways) -> None:
    """O17: what the policy takes away is not executable; what it includes is, and is reported."""
    assert up.inside("dd if=/dev/null of=/dev/null").returncode in {126, 127}
    assert up.inside("ls /").returncode == 0
    assert "- ls" in up.inside(f"cat {STATE}/workspace/TOOLS.md").stdout


def test_the_product_finds_nothing_critical(up: Gateways) -> None:
    """OF16: `openclaw security audit`, with the gateway's own configuration, has no critical finding."""
    environment = (
        f"HOME={STATE}/home OPENCLAW_STATE_DIR={STATE}/home/.openclaw OPENCLAW_CONFIG_PATH={STATE}.d/openclaw.json"
    )
    done = up.inside(f"cd {STATE}/workspace; PATH=/.cloister/bin:/usr/bin {environment} openclaw security audit --json")
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["summary"]["critical"] == 0, done.stdout
    assert "checkId" in done.stdout


def test_a_killed_gateway_comes_back(up: Gateways) -> None:
    """Kill -9: systemd starts it again, and it answers."""
    before = up.machine.show(UNIT_B, "MainPID")
    up.machine.run(["kill", "-KILL", before])
    done = up.machine.run(["cloister", "up", "home/b"], timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert up.machine.show(UNIT_B, "MainPID") not in {"0", before}


def test_an_unreadable_secret_fails_in_the_open(up: Gateways) -> None:
    """OF6: without its token a gateway does not start, and systemd says so; with it, it does."""
    up.machine.run(["mv", "/etc/cloister/keys/password", "/etc/cloister/keys/gone"])
    up.machine.run(["systemctl", "stop", UNIT_B])
    failed = up.machine.run(["systemctl", "start", UNIT_B], check=False)
    up.machine.run(["mv", "/etc/cloister/keys/gone", "/etc/cloister/keys/password"])
    assert failed.returncode != 0
    assert up.machine.run(["cloister", "restart", "home/b"], timeout=200).returncode == 0


def test_nothing_is_left_to_apply(up: Gateways) -> None:
    """A second apply finds everything as declared; `down` stops a gateway and frees nothing else."""
    again = up.machine.run(["cloister", "apply", "--dry-run", "--json"], check=False)
    assert json.loads(again.stdout)["steps"] == [], again.stdout
    up.machine.run(["cloister", "down", "home/b"], timeout=120)
    assert up.machine.show(UNIT_B, "ActiveState") == "inactive", up.machine.journal(UNIT_B)[-3000:]
    assert up.ask() == "FAKE-OK"


def test_a_link_left_behind_leads_nowhere(up: Gateways) -> None:
    """OF9: a link that the agent left where a document is declared later makes the start fail, and nothing else."""
    linked = up.inside(f"rm -f {STATE}/workspace/IDENTITY.md; ln -s {STATE}/home/evil.md {STATE}/workspace/IDENTITY.md")
    assert linked.returncode == 0, linked.stderr
    up.machine.write("/etc/cloister-docs/IDENTITY.md", "declared\n")
    refused = up.machine.run(["cloister", "apply", "--yes"], timeout=240, check=False)
    assert refused.returncode != 0, refused.stdout + up.machine.journal(UNIT_A)[-3000:]
    assert not up.machine.path(f"{STATE}/home/evil.md").exists()
    up.machine.path(f"{STATE}/workspace/IDENTITY.md").unlink()
    up.machine.run(["systemctl", "reset-failed"])
    assert up.machine.run(["cloister", "apply", "--yes"], timeout=240, check=False).returncode == 0
    assert up.inside(f"cat {STATE}/workspace/IDENTITY.md").stdout == "declared\n"


def test_uninstalling_takes_the_gateways_away(up: Gateways) -> None:
    """Last of all: units and sockets are gone; what the gateways kept stays."""
    up.machine.run(["cloister", "uninstall", "--yes"], timeout=200)
    left = [path for path in up.machine.path("/etc/systemd/system").glob("cloister-*") if path.is_file()]
    assert not left  # a directory is of this test
    assert up.machine.path(f"{STATE}/home").exists()
