"""Preparing a run under systemd, in the system's broker: the system's policy, the user's part, this host, a plan.

The counterpart of `prepare`, which it extends: rules, providers and facts of the host are the same. Nothing here
looks into the caller's home or workspace, which this process cannot see.
"""

from __future__ import annotations

import os
import platform
import time

import msgspec

from cloister.egress.addresses import Guard
from cloister.egress.rules import Ruleset
from cloister.errors import DeniedError, PolicyError, Problem, UsageError
from cloister.host import etc
from cloister.host.addresses import nameservers
from cloister.host.agent_program import Program, find_program
from cloister.host.owner import Owner
from cloister.host.systemd_version import systemd_version
from cloister.host.trust_roots import system_bundle
from cloister.isolation.environment import INHERITED
from cloister.plan.steps import Plan
from cloister.plan.unit import AGENTS, ETC, PROXY_RUNTIME, PROXY_STATE, RUNTIME, Account
from cloister.policy.document import read
from cloister.policy.load import load_document, load_project
from cloister.policy.merge import ResolvedAgent
from cloister.policy.model import Agent, Llm, Policy
from cloister.policy.tighten import tighten, tighten_project
from cloister.runs.compile_unit import UnitFacts, compile_unit, unit_home
from cloister.runs.credentials_places import host_path
from cloister.runs.file_variables import FileVariables, fit, of_policy
from cloister.runs.notices import demand
from cloister.runs.paths import Paths
from cloister.runs.policies import PolicyFiles
from cloister.runs.prepare import (
    SHIM,
    Kitchen,
    Prepared,
    model_names,
    new_placeholders,
    protocols_of,
    with_extra_names,
    with_files,
    with_model_words,
)
from cloister.runs.store import new_id
from cloister.runs.unit_asked import Asked
from cloister.runs.unit_internet import UnitInternet, unit_internet

SEARCH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where programs are looked for: the caller's own PATH leads into a home that no unit sees."""
ETC_COPIES = f"{RUNTIME}/etc"
_EXTRA_SYSTEM = ("/nix/store", "/gnu/store")
_FILE = "file:"
_MOST_NOTICES, _NOTICE_LENGTH = 32, 400
"""Of a user's part: it is shown to that user, and kept."""


class SystemPaths(Paths):
    """The places of the system's broker. What people answered is state there: the configuration is root's."""

    __slots__ = ()

    @property
    def decisions(self) -> str:  # type: ignore[explicit-override]  # typing.override: Python 3.12
        """What users answered with `always` and `never`, by account."""
        return f"{self.state}/decisions.json"


def system_paths(config: str = ETC, state: str = PROXY_STATE, runtime: str = PROXY_RUNTIME) -> SystemPaths:
    """Return where the system's broker keeps things; tests have other places."""
    return SystemPaths(state, config, state, runtime)


class UnitKitchen(Kitchen):
    """What stays the same between runs of units."""

    def __init__(self, paths: Paths, owner: Owner) -> None:
        """Look at nothing yet."""
        super().__init__(paths, owner)
        self.policies = PolicyFiles(paths, owner.uid, system="")
        self._asked: dict[str, Asked] = {}

    def prepare_unit(self, asked: Asked) -> Prepared:
        """Return everything a start needs, but for the unit.

        Raises:
            CloisterError: in all its kinds, before anything was changed.
        """
        request, part, account = asked.request, asked.part, asked.account
        self.policies.refuse_ignored()
        self.policies.admit(account.user, request.agent)
        resolved = self._narrowed(asked)
        agent = with_extra_names(resolved.agent, part.extra_names)
        command = request.words if request.replaced else (*agent.command, *request.words)
        if not command:
            raise UsageError("command-missing", "the agent has no command", where=f".agents.{request.agent}.command",
                             remedy=f"cloister run {request.agent} -- COMMAND")  # fmt: skip
        ruleset, guard = self._rules_for(agent.egress, resolved.name)
        files = self._files_for(asked, agent, resolved.name)
        facts = with_files(self._unit_facts(asked, resolved, agent, command[0]), files)
        if agent.egress.mode == "internet":
            facts = msgspec.structs.replace(facts, direct=self._internet(request.agent, agent, ruleset, guard))
        facts = with_model_words(facts, agent, resolved)
        facts = msgspec.structs.replace(facts, notify=demand(resolved.policy.audit))
        plan = compile_unit(agent, resolved.preset, command, tuple(ruleset.allow.describe()), facts)
        refuse_visible(plan, self.paths.home)
        launch = plan.launch
        values = {name: value for name, value in files.home.items() if name in launch.inherit}
        values |= {name: request.environment[name] for name in launch.inherit if name in request.environment}
        named = (*files.home, *agent.pass_environment, *resolved.preset.pass_environment)
        carried = tuple(name for name in dict.fromkeys(named) if name in values and name not in INHERITED)
        placeholders = new_placeholders(facts.protocols, resolved.preset, agent)
        values |= launch.environment | files.policy | placeholders
        return Prepared(
            plan, agent, ruleset, guard, values, carried, resolved.preset.key_environment, self.host(), part.layout,
            resolved.policy, placeholders, user=account.user,
        )  # fmt: skip

    def _files_for(self, asked: Asked, agent: Agent, name: str) -> FileVariables:
        """Return what the user's part and the policy's files bring. A name that loads code comes from neither.

        Raises:
            PolicyError: a file that the policy names cannot be used.
        """
        home = fit(dict(asked.part.variables), agent)
        theirs = (asked.root, asked.home, AGENTS, *filter(None, [asked.repository]))
        policy = of_policy(agent, name, home="", owners=(0, self.owner.uid), forbidden=theirs)
        told = tuple(text[:_NOTICE_LENGTH] for text in asked.part.notices[:_MOST_NOTICES])
        return FileVariables(home, policy, told)

    def count(self, user: str) -> int:
        """Return how many runs of a user live, or are about to."""
        return sum(asked.account.user == user for asked in self._asked.values())

    def refused_now(self, run: str) -> str:
        """Return why a living run's user may not have it any more; nothing where that is allowed still.

        Raises:
            PolicyError: the policy is broken.
        """
        asked = self._asked[run]
        try:
            self.policies.admit(asked.account.user, asked.request.agent)
        except DeniedError as error:
            return error.message
        return ""

    def remember(self, run: str, asked: Asked) -> None:
        """Keep what narrows a living run, for when the policy is read again."""
        self._asked[run] = asked

    def forget(self, run: str) -> None:
        """Forget a run that is over."""
        self._asked.pop(run, None)

    def now_for(self, plan: Plan) -> tuple[Agent, tuple[Ruleset, Guard]]:  # type: ignore[explicit-override]  # Python 3.12
        """Return what holds now for a run that is under way, narrowed as at its start."""
        asked = self._asked[plan.run]
        self.policies.admit(asked.account.user, plan.agent)
        agent = self._narrowed(asked).agent
        return agent, self._rules_for(agent.egress, plan.agent)

    def models_of(self, plan: Plan) -> tuple[Llm, Policy]:  # type: ignore[explicit-override]  # Python 3.12
        """Return the `llm` table and the policy that hold now for a run that is under way."""
        resolved = self._narrowed(self._asked[plan.run])
        return resolved.agent.llm, resolved.policy

    def _internet(self, name: str, agent: Agent, rules: Ruleset, guard: Guard) -> UnitInternet:
        """Decide how a run gets its network; the packet filter of its account has the agent without profile."""
        agents = agent, self.policies.resolve(name, "").agent
        return unit_internet(agents, rules, guard, self.host(), nameservers())

    def _direct(self, name: str, agent: Agent, rules: Ruleset, guard: Guard) -> str:  # type: ignore[explicit-override]  # Python 3.12
        return self._internet(name, agent, rules, guard).internet.ruleset

    def _narrowed(self, asked: Asked) -> ResolvedAgent:
        """Return the system's agent, narrowed by the user's own policy and by the project's file.

        Raises:
            PolicyError: one of them is wrong, or asks for more than it has.
        """
        request, part = asked.request, asked.part
        resolved = self.policies.resolve(request.agent, request.profile)
        agent = resolved.agent
        if part.own_policy:
            document = read(part.own_policy, f"the policy of {asked.account.user}")
            load_document(document)
            agent = tighten(agent, document, ("agents", resolved.name))
        if part.project_policy:
            _, document = load_project(part.project_policy, f"{asked.root}/.cloister.toml")
            agent = tighten_project(agent, resolved.name, document)
        return ResolvedAgent(resolved.name, resolved.profile, agent, resolved.preset, resolved.policy, resolved.sources)

    def _unit_facts(self, asked: Asked, resolved: ResolvedAgent, agent: Agent, command: str) -> UnitFacts:
        request, part, account, host = asked.request, asked.part, asked.account, self.host()
        home, run = unit_home(account), request.run or new_id(time.time())
        program = self._program(command, asked)
        hidden = [path for path in agent.filesystem.hide if path.startswith("/") and os.path.lexists(path)]
        return UnitFacts(
            run=run,
            agent_name=resolved.name,
            profile=request.profile,
            policy_digest=self.policies.digest,
            user=account.user,
            caller_uid=asked.caller_uid,
            account=account,
            systemd=systemd_version(),
            machine=platform.machine(),
            project_id=part.project,
            carried=tuple((name, "directory" if kind == "directory" else "file") for name, kind in part.carried),
            home=home,
            run_state=self.paths.run_state(run),
            run_runtime=self.paths.run_runtime(run),
            shim=SHIM,
            etc_directory=etc_copy(account),
            merged_usr=host.root_links.get("bin") == "usr/bin",
            extra_system=tuple(path for path in _EXTRA_SYSTEM if os.path.isdir(path)),
            directory=asked.directory,
            layout=part.layout,
            idmap=asked.idmap,
            repository=asked.repository,
            copied=part.copied,
            program_path=program.path if program else "",
            program_binds=program.binds if program else (),
            program_names=program.names if program else (),
            read=agent.filesystem.read,
            hide=tuple((path, "directory" if os.path.isdir(path) else "file") for path in hidden),
            git=part.git if agent.git_identity else (),
            landlock_abi=host.landlock_abi,
            trust_roots=system_bundle() if agent.credentials else "",
            own_command=not request.replaced,
            pty=request.pty,
            protocols=protocols_of(agent, resolved.policy),
            models=model_names(agent.llm),
        )

    def _program(self, command: str, asked: Asked) -> Program | None:
        """Find the agent's program on the host; one in the workspace is the agent's own affair."""
        if command.startswith(("./", "../", asked.root + "/")) or ("/" in command and not command.startswith("/")):
            return None
        # A script's interpreter lies beside it where a product brings its own (node).
        search = f"{os.path.dirname(command)}:{SEARCH}" if os.path.isabs(command) else SEARCH
        theirs = (asked.root, AGENTS, *filter(None, [asked.repository]))
        return find_program(command, search, home=unit_home(asked.account), forbidden=theirs)


def etc_copy(account: Account) -> str:
    """Return the path of the assembled `/etc` of an account, which root makes."""
    owner = Owner(account.uid, account.uid, account.name, unit_home(account))
    return etc.locate(ETC_COPIES, owner, hostname="cloister")


def refuse_visible(plan: Plan, home: str) -> None:
    """Refuse a plan whose unit would show one of its own secrets.

    Raises:
        PolicyError: `secret-visible`, with the credential and the place.
    """
    unit = plan.launch.unit
    shown = [
        plan.workspace,
        AGENTS,
        "/usr",
        *(mount.source for mount in (unit.mounts if unit else ()) if mount.base == "host"),
        *(mount.target for mount in (unit.mounts if unit else ()) if mount.base == "repository"),
    ]
    for one in plan.credentials:
        if not one.secret.startswith(_FILE):
            continue
        path = os.path.realpath(host_path(one.secret, home))
        if any(f"{path}/".startswith(f"{os.path.realpath(place).rstrip('/')}/") for place in shown):
            where = f".agents.{plan.agent}.credentials.{one.name}.secret"
            message = f"the agent could read the secret itself, at {path}"
            raise PolicyError(
                [Problem(message, where, "move the file below /etc/cloister, 0640 and of the group cloister-proxy")],
                reference="secret-visible",
            )
