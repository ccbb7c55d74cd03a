"""From `[services]` to what is installed for each gateway: units, configuration, documents, mount points. Pure.

Policy and facts come in, files go out, the same every time; putting them in place, showing the difference and taking
them back is for `cloister apply`. Sources of all of it are read beforehand (`wanted_sources`, `host/service_sources`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping

from cloister.errors import PolicyError, Problem
from cloister.isolation import seccomp, service_units, unit
from cloister.isolation.environment import PATH, Situation, compose
from cloister.isolation.namespace import BIN
from cloister.isolation.service_units import Owned, ServiceUnit
from cloister.plan.service_facts import ServiceFacts, ServiceFile, ServiceUnits, SourceFile
from cloister.plan.unit import Account
from cloister.policy.document import Document, show_path
from cloister.policy.merge import ResolvedAgent, resolve
from cloister.policy.model import Agent, Policy, Preset
from cloister.policy.service_check import PRODUCT
from cloister.policy.service_instances import Gateway, gateways
from cloister.policy.units import parse_cpu, parse_size
from cloister.runs import service_documents
from cloister.runs.channel_secrets import swapped, with_channels
from cloister.runs.openclaw_config import MODEL_KEY, Places, delivered_secrets, openclaw_config, served_providers
from cloister.runs.service_documents import Plugin

UNITS = "/etc/systemd/system"
CONFIG = "openclaw.json"
_PLAIN = re.compile(r"[A-Za-z0-9/._+@-]+")
_MEMORY = 2 << 30
"""OpenClaw takes 1.24 GB after one turn."""


_OWN_WORKSPACE = "its workspace is its own, with nobody else's files in it"
_WITHOUT_EFFECT = {
    "workspace.mode": _OWN_WORKSPACE,
    "workspace.protect": _OWN_WORKSPACE,
    "workspace.unprotected": _OWN_WORKSPACE,
    "unit.ownership": _OWN_WORKSPACE,
    "unit.project_group": _OWN_WORKSPACE,
    "filesystem.hide": "it sees nothing that is not named",
    "carry": "nobody's home is there",
    "pass_environment": "nobody starts it, so nobody's variables are there",
    "environment_files": "environment_files of the service are read",
    "settings": "what it is told is made of the service's own keys",
    "limits.disk_max": "its state is kept on the disk, where nothing counts it",
    "agent_sandbox.managed": "the product of a gateway brings no such sandbox",
    "llm.on_exhausted": "nobody is there who could be asked",
}
"""Keys of an agent that a gateway does not obey, each with why."""


def active(document: Document) -> tuple[Gateway, ...]:
    """Return the gateways of a checked policy that are enabled; each needs an account, named by `Gateway.joined`."""
    return tuple(gateway for gateway in gateways(document.tables) if gateway.settings.enable)


def wanted_sources(document: Document) -> tuple[str, ...]:
    """Return the directories to read for them."""
    found: dict[str, None] = {}
    for gateway in active(document):
        settings = gateway.settings
        paths = [settings.documents.directory, *(skill.source for skill in settings.skills)]
        paths += [plugin.source for plugin in settings.plugins.values() if plugin.enable]
        found |= dict.fromkeys(path for path in paths if path)
    return tuple(found)


def wanted_tools(document: Document) -> tuple[str, ...]:
    """Return the names of programs to look for."""
    return tuple(dict.fromkeys(name for gateway in active(document) for name in gateway.settings.tools.include))


def render_service_units(
    document: Document,
    policy: Policy,
    presets: Mapping[str, Preset],
    accounts: Mapping[str, Account],
    facts: ServiceFacts,
) -> tuple[ServiceUnits, ...]:
    """Return what is installed for every enabled gateway.

    Args:
        document: the system's policy as it was read, and
        policy: what it says, checked.
        presets: all there are.
        accounts: by `Gateway.joined`.
        facts: of this host.

    Raises:
        PolicyError: `service-invalid`, with everything that this host lacks for them.
    """
    problems: list[Problem] = []
    made = []
    for gateway in active(document):
        agent = resolve(document, gateway.settings.agent, presets=presets, policy=policy)
        made.append(_Maker(gateway, agent, accounts[gateway.joined], facts, problems).units())
    if problems:
        raise PolicyError(problems, reference="service-invalid")
    return tuple(made)


class _Maker:
    """One gateway: its parts are looked up once, and then put into files."""

    def __init__(
        self, gateway: Gateway, agent: ResolvedAgent, account: Account, facts: ServiceFacts, problems: list[Problem]
    ) -> None:
        self._gateway, self._resolved, self._account, self._facts = gateway, agent, account, facts
        self._problems = problems
        self._at = Owned(account.name)
        self._agent = with_channels(agent.agent, gateway)
        self._product = agent.agent.preset == PRODUCT

    def units(self) -> ServiceUnits:
        """Return everything that is installed for it."""
        gateway, facts, problems = self._gateway, self._facts, self._problems
        plugins = service_documents.plugins(gateway, facts, problems)
        documents = service_documents.documents(gateway, facts, problems)
        skills = service_documents.skills(gateway, plugins, facts, problems)
        self._refuse(gateway, self._resolved.agent)
        unit_of = self._unit(plugins, tuple(documents))
        self._refuse_signs(unit_of)
        joined, tree = gateway.joined, self._at.tree
        owned = [*self._configuration(plugins), *_below("documents", documents), *_below("skills", skills)]
        owned += [(f"etc/{name}", SourceFile(text=text)) for name, text in self._etc().items()]
        files = [self._file(f"{tree}/{path}", file) for path, file in owned]
        texts = {
            service_units.unit_name(joined): service_units.service_text(unit_of),
            service_units.places_unit(joined): service_units.places_text(unit_of),
            **service_units.port_texts(unit_of),
        }
        ends = (service_units.end_unit(joined),) if unit_of.waited_for else ()
        texts |= dict.fromkeys(ends, service_units.end_text(unit_of))
        system = [ServiceFile(path=f"{UNITS}/{name}", text=text) for name, text in texts.items()]
        system.append(
            ServiceFile(path=f"{tree}/{service_units.MOUNT_POINTS}", text=service_units.tmpfiles_text(unit_of))
        )
        socket, relay = service_units.port_units(joined)
        directories = dict.fromkeys(
            [service_units.SERVICES, tree, *(f"{tree}/{name}" for name in ("etc", "documents", "skills"))]
        )
        directories |= dict.fromkeys(level for file in files for level in _parents(file.path, tree))
        return ServiceUnits(
            joined=joined,
            account=self._account.name,
            files=(*system, *files),
            directories=tuple(directories),
            enabled=(socket, service_units.unit_name(joined)),
            passive=(relay, service_units.places_unit(joined), *ends),
            restart_for=tuple(file.path for file in (*system, *files)),
        )

    def _refuse(self, gateway: Gateway, agent: Agent) -> None:
        """Note what the agent has and no gateway can be given, and what would have no effect on one."""
        name, plain = gateway.settings.agent, Agent()
        written = self._resolved.policy.agents[name]  # a preset's own words are for runs
        for key, why in _WITHOUT_EFFECT.items():
            if (value := _at(written, key)) != _at(plain, key):
                message = f"{key} = {json.dumps(value, default=str)[:80]} would have no effect on a gateway: {why}"
                self._problems.append(Problem(message, show_path(("agents", name, *key.split("."))), f"remove {key}"))
        where = show_path(("agents", gateway.settings.agent))
        for key, asked in (
            ("filesystem.write", agent.filesystem.write),
            ("credentials", [name for name, one in agent.credentials.items() if one.keys]),
            ("workspace.roots", agent.workspace.roots),
            ("limits.runtime_max", agent.limits.runtime_max),
        ):
            if asked:
                message = (
                    f"the agent of a service has no {key}: its workspace is its own, and nobody's keys are at hand"
                )
                self._problems.append(Problem(message, where, f"remove {key}"))
        if agent.egress.mode == "internet":
            remedy = 'egress.mode = "learn", or "deny" with a list'
            self._problems.append(Problem("a gateway has no addresses of its own to reach the Internet", where, remedy))
        if agent.egress.mode == "ask":
            self._problems.append(Problem("nobody is there whom a gateway could ask", where, 'egress.mode = "deny"'))
        self._refuse_missing(gateway, agent, where)

    def _refuse_missing(self, gateway: Gateway, agent: Agent, where: str) -> None:
        """Note programs that are not there, and a credential that is there twice."""
        for name in swapped(gateway.settings).keys() & agent.credentials.keys():
            message = f"the agent has a credential {name}, and a channel of the gateway one of that name"
            self._problems.append(Problem(message, f"{where}.credentials.{name}", "rename it"))
        if gateway.settings.agent not in self._facts.programs:
            command = (*agent.command, "")[0]
            remedy = f'install it, or command = ["/path/of/{command}"]'
            self._problems.append(Problem(f"no program {command!r} was found", where, remedy))
        if (port := gateway.settings.port) in self._facts.taken:
            message, at = f"another program has port {port} of this host", show_path((*gateway.path, "port"))
            self._problems.append(Problem(message, at, f"another port, or end what ss -ltnp 'sport = :{port}' shows"))
        for name in gateway.settings.tools.include:
            if name not in self._facts.tools:
                at = show_path((*gateway.path, "tools", "include"))
                self._problems.append(Problem(f"there is no program {name} in /usr/bin or /bin", at, f"install {name}"))

    def _refuse_signs(self, unit_of: ServiceUnit) -> None:
        """Refuse names to which lists of mounts, or systemd-tmpfiles, would give a meaning of their own."""
        named = (*unit_of.shown, *unit_of.documents, *unit_of.seeded, *unit_of.state, *unit_of.programs)
        for name in named:
            if not _PLAIN.fullmatch(name):
                message = f"{name!r} holds spaces or signs: a service is shown names of letters, digits and /._+@- only"
                self._problems.append(Problem(message, show_path(self._gateway.path), "rename it"))

    def _unit(self, plugins: tuple[Plugin, ...], documents: tuple[str, ...]) -> ServiceUnit:
        gateway, facts, agent = self._gateway, self._facts, self._agent
        settings, program = gateway.settings, facts.programs.get(gateway.settings.agent)
        writable = settings.documents.writable
        secrets = delivered_secrets(settings, product=self._product) | _plugin_secrets(gateway, plugins)
        credentials = {name: _source_of(reference) for name, reference in secrets.items()}
        checked = tuple(credentials)
        handed = (*swapped(settings), *([MODEL_KEY] if agent.llm.providers else []))
        credentials |= {name: f"{service_units.broker_directory(gateway.joined)}/{name}" for name in handed}
        shown = [*(program.binds if program else ()), *agent.filesystem.read, *(plugin.source for plugin in plugins)]
        return ServiceUnit(
            joined=gateway.joined,
            label=gateway.label,
            account=self._account.name,
            port=settings.port,
            restart=settings.restart,
            properties=self._properties(),
            command=self._command(program.path if program else ""),
            environment=self._environment(plugins),
            environment_files=settings.environment_files,
            credentials=credentials,
            checked=checked,
            handed=handed,
            shim=facts.shim,
            links=facts.links,
            programs=dict(program.names) if program else {},
            shown=tuple(path for path in dict.fromkeys(shown) if not path.startswith("/usr/")),
            etc=tuple(self._etc()),
            documents=tuple(name for name in documents if name not in writable),
            seeded=tuple(name for name in documents if name in writable),
            state=tuple(path.strip("/") for plugin in plugins for path in plugin.file.state_dirs),
            settings={
                f"{plugin.file.state_dirs[0].strip('/')}/config.json": f"plugins/{plugin.name}.json"
                for plugin in plugins
                if settings.plugins[plugin.name].settings and plugin.file.state_dirs
            },
            hidden=tuple(f"/usr/bin/{name}" for name in settings.tools.exclude),
            validate=(program.path, "config", "validate") if program and self._product else (),
            seccomp=seccomp.assemble(
                facts.machine,
                nested=agent.hardening.nested,
                ptrace=agent.hardening.ptrace,
                netlink=agent.hardening.netlink,
            ),
            landlock=agent.hardening.landlock,
            nested=agent.hardening.nested,
            out_of_memory="continue" if self._product else agent.unit.oom,
        )

    def _properties(self) -> tuple[tuple[str, str], ...]:
        agent, facts = self._resolved.agent, self._facts
        limits = agent.limits
        memory = parse_size(limits.memory_max) if limits.memory_max else _MEMORY if self._product else None
        box = unit.UnitBox(
            systemd=facts.systemd,
            account=self._account.name,
            shim=facts.shim,
            etc_directory=f"{self._at.tree}/etc",
            merged_usr=facts.merged_usr,
            nested=agent.hardening.nested,
            netlink=agent.hardening.netlink,
            write_execute=agent.hardening.write_execute,
            limits=unit.UnitLimits(
                memory_bytes=memory,
                tasks=limits.tasks_max,
                cpu_percent=parse_cpu(limits.cpu_quota) if limits.cpu_quota else None,
                open_files=limits.open_files,
                io_weight=agent.unit.io_weight,
                oom=agent.unit.oom,
            ),
        )
        return unit.properties(box)

    def _command(self, program: str) -> tuple[str, ...]:
        rest = self._resolved.agent.command[1:]
        more = ("gateway", "--port", str(self._gateway.settings.port)) if self._product else ()
        return (program, *rest, *more)

    def _environment(self, plugins: tuple[Plugin, ...]) -> dict[str, str]:
        agent, settings = self._agent, self._gateway.settings
        situation = Situation(
            run=service_units.unit_name(self._gateway.joined).removesuffix(".service"),
            agent=self._gateway.settings.agent,
            user=self._account.name,
            home=self._at.home,
            workspace=self._at.workspace,
            shell=self._facts.shell,
            protocols=tuple(one.protocol for one in served_providers(agent, self._resolved.policy.providers).values()),
        )
        literal, _ = compose(agent, self._resolved.preset, situation)
        packages = [f"{plugin.source}/{path.strip('/')}" for plugin in plugins for path in plugin.file.packages]
        literal["PATH"] = ":".join([service_units.PROGRAMS, *packages, PATH.removeprefix(f"{BIN}:")])
        for plugin in plugins:
            for variable in settings.plugins[plugin.name].env:
                literal[variable] = f"{self._at.secrets}/{_plugin_secret(plugin.name, variable)}"
        literal |= {"CLOISTER_SECRETS": self._at.secrets} | settings.environment
        if self._product:
            literal |= {"OPENCLAW_CONFIG_PATH": f"{self._at.tree}/{CONFIG}", "OPENCLAW_CONFIG_READONLY": "1"}
        return literal

    def _configuration(self, plugins: tuple[Plugin, ...]) -> Iterator[tuple[str, SourceFile]]:
        if self._product:
            places = Places(workspace=self._at.workspace, credentials=self._at.secrets)
            config = openclaw_config(self._gateway, self._resolved.agent, self._resolved.policy.providers, places)
            yield CONFIG, SourceFile(text=json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        for plugin in plugins:
            if table := self._gateway.settings.plugins[plugin.name].settings:
                yield f"plugins/{plugin.name}.json", SourceFile(text=json.dumps(table, indent=2) + "\n")

    def _etc(self) -> dict[str, str]:
        name, uid, host = self._account.name, self._account.uid, self._facts.hostname
        return {
            # Gateways start tools through the shell of passwd; on the host the account has none (nologin).
            "passwd": "root:x:0:0:root:/root:/usr/sbin/nologin\nnobody:x:65534:65534::/nonexistent:/usr/sbin/nologin\n"
            f"{name}:x:{uid}:{uid}::{self._at.home}:{self._facts.shell}\n",
            "group": f"root:x:0:\nnogroup:x:65534:\n{name}:x:{uid}:\n",
            "hosts": f"127.0.0.1 localhost {host}\n::1 localhost\n",
            "hostname": f"{host}\n",
            "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\nservices: files\nprotocols: files\n",
            "resolv.conf": "# names are resolved by the egress proxy\n",
            "machine-id": hashlib.sha256(f"cloister:{name}".encode()).hexdigest()[:32] + "\n",
        }

    def _file(self, path: str, file: SourceFile) -> ServiceFile:
        """Return a file of the tree: read by the gateway, and by nobody else on the host."""
        public = f"{self._at.tree}/etc/"
        if path.startswith(public):
            return ServiceFile(path=path, text=file.text)
        return ServiceFile(
            path=path, text=file.text, mode=0o750 if file.executable else 0o640, account=self._account.name
        )


def _at(agent: Agent, key: str) -> object:
    """Return the value of a key of an agent, by its path with dots."""
    value: object = agent
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _plugin_secret(plugin: str, variable: str) -> str:
    return f"plugin-{plugin}-{variable}"


def _plugin_secrets(gateway: Gateway, plugins: tuple[Plugin, ...]) -> dict[str, str]:
    return {
        _plugin_secret(plugin.name, variable): reference
        for plugin in plugins
        for variable, reference in gateway.settings.plugins[plugin.name].env.items()
    }


def _source_of(reference: str) -> str:
    """Return where systemd finds a secret: a path, or a name in its own store (systemd.exec(5), LoadCredential=)."""
    return reference.partition(":")[2]


def _below(directory: str, files: Mapping[str, SourceFile]) -> list[tuple[str, SourceFile]]:
    return [(f"{directory}/{path}", file) for path, file in files.items()]


def _parents(path: str, top: str) -> list[str]:
    """Return the directories between `top` and the file, outermost first."""
    parts = path.removeprefix(f"{top}/").split("/")[:-1]
    return [f"{top}/{'/'.join(parts[: end + 1])}" for end in range(len(parts))]
