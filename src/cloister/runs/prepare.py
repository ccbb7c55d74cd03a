"""Preparing a run: read the policy, look at the host, compile. What `run`, `plan` and `explain` have in common.

`Kitchen` keeps what does not change between two runs of one user (parsed policy files, git's
settings, the assembled `/etc`), so that a prepared run costs the broker about a millisecond.
Nothing is changed on the host here, except that the assembled `/etc` may be renewed.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import msgspec

from cloister.egress.addresses import Guard
from cloister.egress.rules import Ruleset, compile_guard, compile_ruleset
from cloister.errors import CloisterError, PolicyError, Problem, StepError, UsageError
from cloister.host import etc
from cloister.host.addresses import attached_networks, nameservers, own_addresses
from cloister.host.agent_program import Program, find_program
from cloister.host.gpg_keys import GpgKeys
from cloister.host.owner import GitSettings, Owner
from cloister.host.probe import can_hold, probe
from cloister.host.trust_roots import system_bundle
from cloister.isolation.environment import INHERITED
from cloister.plan.facts import HostFacts
from cloister.plan.steps import Plan
from cloister.plan.workspace import WorkspaceLayout
from cloister.policy.merge import ResolvedAgent
from cloister.policy.model import Agent, Egress, Llm, Policy, Preset
from cloister.policy.values import check_variable
from cloister.policy.variables import variables
from cloister.runs.compile import CarriedPath, Facts, PlacedFile, compile_run
from cloister.runs.compile_parts import Start
from cloister.runs.file_variables import FileVariables, of_home, of_policy
from cloister.runs.home_files import HomeFiles, home_files, merge_models, merge_settings
from cloister.runs.internet import Internet, internet
from cloister.runs.limits import means
from cloister.runs.model_files import model_files
from cloister.runs.model_plan import planned_models
from cloister.runs.notices import demand
from cloister.runs.paths import Paths
from cloister.runs.policies import PolicyFiles
from cloister.runs.request import RunRequest
from cloister.runs.signing import look_up_keys
from cloister.runs.signing_model import Situation as SigningSituation
from cloister.runs.signing_model import Sources
from cloister.runs.store import new_id
from cloister.runs.workspaces import Workspaces, expand, project_id, real_path

if TYPE_CHECKING:
    from cloister.plan.vm_snapshot import Snapshot
    from cloister.runs.compile_vm import VmFacts

SHIM = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "host", "shim", "cloister-shim")

F = TypeVar("F", bound=Start)
TOKEN_VARIABLE = "CLOISTER_MODEL_KEY"  # noqa: S105 - a name, not a key
"""Holds the placeholder in every run that has models, whatever the product calls its own."""


class Prepared(msgspec.Struct, frozen=True):
    """A run that is ready to start."""

    plan: Plan
    agent: Agent
    ruleset: Ruleset
    guard: Guard
    environment: dict[str, str]
    """The whole environment, inherited values included: for the launch only, never stored."""
    carried_names: tuple[str, ...]
    """Names whose values come from the caller beyond terminal and language: what the audit shows."""
    model_keys: tuple[str, ...]
    """Names in which the product takes a model key."""
    host: HostFacts
    layout: WorkspaceLayout
    policy: Policy
    """The file the agent stands in, for its providers."""
    placeholders: dict[str, str]
    """Variables with the key that opens the run's own way to the models: for the launch only, never stored."""
    sources: Sources = Sources()
    """Where the person's own agents are; for the launch only, never stored."""
    user: str = ""
    """Whose run it is, where that is not whoever the broker runs as."""
    kept: Snapshot | None = None
    """The snapshot from whose memory it goes on."""
    extra_names: tuple[str, ...] = ()
    """Variables that its caller has carried in by name."""


class Looked(NamedTuple):
    """What a request means, before anything of the host but its workspace was looked at."""

    project: str
    """The top of the work tree, where the project's own policy file is looked for."""
    resolved: ResolvedAgent
    agent: Agent
    """Narrowed by the project's file, with the variables named on the command line."""
    layout: WorkspaceLayout
    machine: VmFacts | None = None
    """What can run a guest here, where that was found out before (`vm_tried.py`)."""


class Kitchen:
    """What stays the same between runs of one user."""

    def __init__(self, paths: Paths, owner: Owner, *, writes: bool = True) -> None:
        """Look at nothing yet. Without `writes` the assembled `/etc` is named in the plan and not made."""
        self.paths = paths
        self._writes = writes
        self.owner = owner
        self.policies = PolicyFiles(paths, owner.uid)
        self._git = GitSettings(paths.home, os.path.dirname(paths.config))
        self._gpg_keys = GpgKeys()
        self._etc: dict[str, tuple[str, float]] = {}
        self._facts: tuple[HostFacts, float] | None = None
        self._holds: bool | None = None
        self._workspaces = Workspaces(paths, owner)
        self._rules: dict[str, tuple[tuple[Egress, tuple[str, ...], tuple[str, ...]], tuple[Ruleset, Guard]]] = {}

    def host(self) -> HostFacts:
        """Return the host's facts, looked up again after a minute."""
        now = time.monotonic()
        if self._facts is None or now - self._facts[1] > 60:  # noqa: PLR2004  # a minute
            self._facts = (probe(), now)
        return self._facts[0]

    def _can_hold(self) -> bool:
        """Tell whether mounts can be made before bubblewrap's: tried once, since Ubuntu lets only some programs."""
        if self._holds is None:
            self._holds = can_hold(SHIM)
        return self._holds

    def git(self) -> tuple[tuple[str, str], ...]:
        """Return the user's git identity, and directories that git may trust."""
        return self._git.read()

    def look(self, request: RunRequest) -> Looked:
        """Return which agent a request means, and its workspace as it is now.

        Raises:
            CloisterError: the policy does not allow it, or there is no fit workspace.
        """
        project = self._workspaces.project(request.directory)
        self.policies.refuse_ignored()
        admitted = self.policies.admit(self.owner.name, request.agent)
        resolved = self.policies.resolve(request.agent, request.profile, workspace=project)
        agent = with_extra_names(resolved.agent, request.extra_names)
        if request.machine:
            from cloister.runs.vm_narrow import narrowed

            agent = narrowed(agent, request)
        layout = self._workspaces.lay_out(agent, resolved.name, request.directory, project, admitted)
        return Looked(project, resolved, agent, layout)

    def prepare(self, request: RunRequest, run: str = "", looked: Looked | None = None) -> Prepared:
        """Return everything a start needs; `looked` is what `look` has said of the request.

        Raises:
            CloisterError: in all its kinds, before anything was changed.
        """
        looked = looked or self.look(request)
        project, resolved, agent, layout, machine = looked
        root, guest, kept = layout.root, agent.isolation == "microvm", self._kept(request)
        command = request.words if request.replaced else (*agent.command, *request.words)
        if not command:
            raise UsageError("command-missing", "the agent has no command", where=f".agents.{request.agent}.command",
                             remedy=f"cloister run {request.agent} -- COMMAND")  # fmt: skip
        program, search = None, request.environment.get("PATH", os.defpath)
        if not guest and _outside(command[0], root):  # a guest's programs are those of its image
            program = find_program(command[0], search, home=self.paths.home, forbidden=(root,))
        ruleset, guard = self._rules_for(agent.egress, resolved.name)
        run = run or new_id(time.time())
        wanted = agent.egress.mode == "internet" and not guest
        direct = internet(ruleset, guard, self.host(), nameservers()) if wanted else None
        found = self.home_files(looked)
        files = self._file_variables(agent, resolved, root, found)
        facts = self._facts_for(run, request, resolved, agent, layout, program, found, direct)
        facts = with_files(facts, files)
        signing, sources = look_up_keys(agent, self._signing_situation(agent, resolved.name, request, facts))
        placed = self._login_files(agent, resolved.name) if agent.credentials else ()
        facts = msgspec.structs.replace(facts, profile=request.profile, project=project, signing=signing, placed=placed)
        facts = with_model_words(facts, agent, resolved)
        facts = msgspec.structs.replace(facts, notify=demand(resolved.policy.audit, guest=guest))
        if guest:
            from cloister.runs.prepare_vm import compile_plan

            plan = compile_plan(self, agent, resolved, command, ruleset, facts, found, request, kept, machine)
        else:
            plan = compile_run(agent, resolved.preset, command, tuple(ruleset.allow.describe()), facts)
        self._refuse_visible(plan)
        launch = plan.launch
        values = {name: value for name, value in files.home.items() if name in launch.inherit}
        values |= {name: request.environment[name] for name in launch.inherit if name in request.environment}
        named = (*files.home, *agent.pass_environment, *resolved.preset.pass_environment)
        carried = tuple(name for name in dict.fromkeys(named) if name in values and name not in INHERITED)
        keys = resolved.preset.key_environment
        values |= launch.environment | files.policy
        placeholders = new_placeholders(facts.protocols, resolved.preset, agent)
        values |= placeholders
        return Prepared(
            plan, agent, ruleset, guard, values, carried, keys, self.host(), layout,
            resolved.policy, placeholders, sources, kept=kept, extra_names=request.extra_names,
        )  # fmt: skip

    def _kept(self, request: RunRequest) -> Snapshot | None:
        """Return the record of the snapshot from whose memory a run goes on; nothing of it is imported before."""
        if not request.resume:
            return None
        from cloister.runs.vm_snapshots import kept_record

        return kept_record(self.paths, request)

    def _refuse_visible(self, plan: Plan) -> None:
        """Refuse a plan that would show one of its own secrets; one for a guest was looked at already."""
        if plan.credentials and not plan.launch.vm:
            from cloister.runs.credentials_places import refuse_visible
            from cloister.runs.explain import look

            refuse_visible(plan, self.paths.home, look)

    def _signing_situation(self, agent: Agent, name: str, request: RunRequest, facts: Facts) -> SigningSituation:
        return SigningSituation(
            agent=name,
            uid=self.owner.uid,
            home=self.paths.home,
            writable=(facts.layout.root, facts.state, *facts.write),
            environment={name: request.environment.get(name, "") for name in ("SSH_AUTH_SOCK", "GNUPGHOME")},
            git=self._git.signing() if agent.credentials else {},
            gpg_keys=self._gpg_keys,
        )

    def home_files(self, looked: Looked) -> HomeFiles:
        """Return what of the home is carried in."""
        paths, preset = self.paths, looked.resolved.preset
        return home_files(
            looked.agent, preset, paths.home, config=self.policies.config_of(self.owner.name, looked.resolved.name),
            forbidden=(looked.layout.root, *filter(None, (paths.config, paths.state, paths.runtime, paths.cache))),
        )  # fmt: skip

    def _file_variables(self, agent: Agent, resolved: ResolvedAgent, root: str, found: HomeFiles) -> FileVariables:
        """Return what files bring, and what there is to say of files that were read.

        Raises:
            PolicyError: one that the policy names cannot be used.
        """
        paths, preset = self.paths, resolved.preset
        theirs = (root, paths.agents, *map(real_path, expand(agent.filesystem.write, paths.home)))
        home, notices = of_home(paths.home, found.environment, agent, theirs)
        if agent.settings:
            notices += merge_settings(agent, preset, found.settings)[1]
        notices += tuple(notice for _, told in own_models(agent, resolved, found).values() for notice in told)
        policy = {}
        if agent.environment_files:
            policy = of_policy(agent, resolved.name, home=paths.home, owners=(0, self.owner.uid), forbidden=theirs)
        return FileVariables(home, policy, notices)

    def _facts_for(  # noqa: PLR0913  # what `prepare` has at hand
        self, run: str, request: RunRequest, resolved: ResolvedAgent, agent: Agent, layout: WorkspaceLayout,
        program: Program | None, found: HomeFiles, direct: Internet | None,
    ) -> Facts:  # fmt: skip
        paths, owner, host = self.paths, self.owner, self.host()
        real, root = real_path(request.directory), layout.root
        masks = [(f"{paths.home}/{name}", kind) for name, kind in found.masks]
        masks += [(path, _kind(path)) for path in expand(agent.filesystem.hide, paths.home) if os.path.lexists(path)]
        return Facts(
            run=run,
            agent_name=resolved.name,
            policy_digest=self.policies.digest,
            uid=owner.uid,
            gid=owner.gid,
            user=owner.name,
            home=paths.home,
            state=f"{paths.agents}/{resolved.name}/{project_id(layout)}",
            run_state=paths.run_state(run),
            run_runtime=paths.run_runtime(run),
            shim=SHIM,
            bubblewrap=host.bwrap.path,
            etc_directory=self._etc_directory(direct.resolver if direct else ""),
            merged_usr=host.root_links.get("bin") == "usr/bin",
            extra_system=tuple(path for path in ("/nix/store", "/gnu/store") if os.path.isdir(path)),
            directory=real if real == root or real.startswith(root + "/") else root,
            layout=layout,
            program_path=program.path if program else "",
            program_binds=program.binds if program else (),
            program_names=program.names if program else (),
            carried=tuple(CarriedPath(path.name, path.source, path.kind) for path in found.carried),
            settings=found.settings,
            model_sources=found.models,
            read=_showable(expand(agent.filesystem.read, paths.home), "read", paths),
            write=_showable(expand(agent.filesystem.write, paths.home), "write", paths),
            hide=tuple(masks),
            git=self._git.read() if agent.git_identity else (),
            limit_means=means(host),
            landlock_abi=host.landlock_abi,
            holds=self._can_hold(),
            trust_roots=system_bundle() if agent.credentials else "",
            own_command=not request.replaced,
            pty=request.pty,
            protocols=protocols_of(agent, resolved.policy),
            models=model_names(agent.llm),
            internet=direct,
        )

    def _login_files(self, agent: Agent, name: str) -> tuple[PlacedFile, ...]:
        """Return where products find logins; refuse a login towards a host it is not for."""
        from cloister.runs import login_files

        describe = login_files.describer(self.paths.logins)
        login_files.refuse_hosts(agent, name, describe)
        return tuple(login_files.placed_files(agent, describe))

    def _etc_directory(self, nameserver: str) -> str:
        """Return the assembled `/etc`, checked again after a minute."""
        path, checked = self._etc.get(nameserver, ("", 0.0))
        now = time.monotonic()
        if not path or now - checked > 60 or not os.path.isdir(path):  # noqa: PLR2004  # a minute
            owner = self.owner._replace(home=self.paths.home)
            if self._writes:
                os.makedirs(self.paths.etc, mode=0o700, exist_ok=True)
            make = etc.assemble if self._writes else etc.locate
            path = make(self.paths.etc, owner, hostname="cloister", nameserver=nameserver)
            self._etc[nameserver] = (path, now)
        return path

    def now_for(self, plan: Plan) -> tuple[Agent, tuple[Ruleset, Guard]]:
        """Return what holds now for a run that is under way: same agent, profile and project as at its start.

        The variables named with `--env` are not among what a reload can change, and open no host.
        """
        agent = self.policies.resolve(plan.agent, plan.profile, workspace=plan.project).agent
        if agent.credentials:
            from cloister.runs import login_files

            with contextlib.suppress(UsageError, StepError):  # a login that is gone fails where it is used
                login_files.refuse_hosts(agent, plan.agent, login_files.describer(self.paths.logins))
        return agent, self._rules_for(agent.egress, plan.agent)

    def models_of(self, plan: Plan) -> tuple[Llm, Policy]:
        """Return the `llm` table and the policy that hold now for a run that is under way."""
        resolved = self.policies.resolve(plan.agent, plan.profile, workspace=plan.project)
        llm = resolved.agent.llm
        if plan.steps and plan.launch.vm and plan.launch.vm.model:
            from cloister.runs.vm_narrow import only_model

            llm = only_model(llm, plan.launch.vm.model)
        return llm, resolved.policy

    def _rules_for(self, egress: Egress, agent: str) -> tuple[Ruleset, Guard]:
        """Return an agent's rules, compiled again when they or the host's addresses have changed (0.8 ms)."""
        own, attached = own_addresses(), attached_networks()
        kept = self._rules.get(agent)
        if kept is None or kept[0] != (egress, own, attached):
            addresses = tuple(ip_address(text) for text in own)
            networks = tuple(ip_network(text) for text in attached)
            compiled = (
                compile_ruleset(egress, agent=agent),
                compile_guard(egress, addresses, networks, agent=agent),
            )
            kept = self._rules[agent] = ((egress, own, attached), compiled)
        return kept[1]

    def filter_outdated(self, plan: Plan) -> bool:
        """Say whether a run's packet filter, loaded once at its start, is not what the rules would give now."""
        if not plan.launch.ruleset:
            return False
        try:
            agent, (rules, guard) = self.now_for(plan)
            return rules.mode != "internet" or self._direct(plan.agent, agent, rules, guard) != plan.launch.ruleset
        except CloisterError:
            return True

    def _direct(self, name: str, agent: Agent, rules: Ruleset, guard: Guard) -> str:
        """Return the packet filter that a run in mode `internet` would get now."""
        del name, agent
        return internet(rules, guard, self.host(), nameservers()).ruleset


def protocols_of(agent: Agent, policy: Policy) -> tuple[str, ...]:
    """Return the protocols of an agent's providers; whoever serves Responses serves the rest of OpenAI as well."""
    named = [policy.providers[name].protocol for name in agent.llm.providers if name in policy.providers]
    return tuple(dict.fromkeys([*named, *(["openai"] if "openai-responses" in named else [])]))


def own_models(agent: Agent, resolved: ResolvedAgent, found: HomeFiles) -> dict[str, tuple[bytes, tuple[str, ...]]]:
    """Return the home's own files of models with the policy's laid over, by name, and what there is to say of each."""
    sources = dict(found.models)
    made = model_files(resolved.preset, protocols_of(agent, resolved.policy), model_names(agent.llm)) if sources else ()
    return {name: merge_models(name, text, sources[name]) for name, text in made if name in sources}


def model_names(llm: Llm) -> tuple[str, ...]:
    """Return the models that a policy names exactly, for products that have to be told."""
    if not llm.providers:
        return ()
    from cloister.llm.access import Access

    return Access(llm).names()


def with_model_words(facts: F, agent: Agent, resolved: ResolvedAgent) -> F:
    """Add what the plan says of models."""
    variables = _key_variables(facts.protocols, resolved.preset, agent)
    words = planned_models(agent.llm, resolved.policy.providers, variables)
    return msgspec.structs.replace(facts, model_words=words)


def new_placeholders(protocols: tuple[str, ...], preset: Preset, agent: Agent) -> dict[str, str]:
    """Return the key variables of a run that has models. What the policy itself sets there is the owner's word."""
    if not protocols:
        return {}
    from cloister.runs.model_calls import new_placeholder

    return dict.fromkeys(_key_variables(protocols, preset, agent), new_placeholder())


def _key_variables(protocols: tuple[str, ...], preset: Preset, agent: Agent) -> tuple[str, ...]:
    names = [name for protocol in protocols for name in preset.placeholder.get(protocol, ())]
    return (TOKEN_VARIABLE, *(name for name in dict.fromkeys(names) if name not in agent.environment))


def with_extra_names(agent: Agent, names: tuple[str, ...]) -> Agent:
    """Return the agent with variables carried in that were named on the command line.

    Raises:
        UsageError: one of them may never be carried in, or holds a placeholder here.
    """
    if not names:
        return agent
    taken = {variable for one in agent.credentials.values() for variable in variables(one)}
    for name in names:
        try:
            check_variable(name)  # what a policy may not carry in, a word on the command line may not either
        except ValueError as error:
            message = f"{name!r} cannot be carried in: {error}"
            raise UsageError("environment-name", message, remedy="cloister run --env EDITOR ...") from None
        if name in taken:
            message = f"the variable {name} holds a placeholder here: carried in, the agent would have the secret"
            raise UsageError("environment-name", message, remedy=f"leave --env {name} out")
    return msgspec.structs.replace(agent, pass_environment=(*agent.pass_environment, *names))


def with_files(facts: F, files: FileVariables) -> F:
    """Add which variables files bring: names only."""
    home, policy = tuple(files.home), tuple(files.policy)
    return msgspec.structs.replace(facts, home_names=home, filed_names=policy, file_notices=files.notices)


def _outside(name: str, root: str) -> bool:
    """Tell whether the program must be found on the host: a path in the workspace is the agent's own."""
    return not (name.startswith(("./", "../", root + "/")) or ("/" in name and not name.startswith("/")))


def _showable(names: tuple[str, ...], key: str, paths: Paths) -> tuple[str, ...]:
    """Return the paths, each there and none of them a way to the whole home or to our own files.

    Links are followed for the question: what counts is what would be mounted. Whoever can see our runtime
    directory can ask the broker for a sandbox of another policy.
    """
    for name in names:
        where, real = f".filesystem.{key}", real_path(name)
        if not os.path.exists(name):
            problem = Problem(f"{name} does not exist", where, f"remove it, or: mkdir -p {name}")
            raise PolicyError([problem], reference="path-missing")
        for own in map(os.path.realpath, filter(None, (paths.config, paths.state, paths.runtime, paths.cache))):
            if real == "/" or f"{own}/".startswith(f"{real}/") or real.startswith(f"{own}/"):
                problem = Problem(f"{name} would show the agent Cloister's own {own}", where, "name a narrower path")
                raise PolicyError([problem], reference="path-reserved")
        if f"{paths.home}/".startswith(f"{real}/"):
            problem = Problem(f"{name} would show the agent the whole home", where, "name a directory below it")
            raise PolicyError([problem], reference="path-reserved")
    return names


def _kind(path: str) -> str:
    return "directory" if os.path.isdir(path) else "file"


def mapping(values: Mapping[str, str]) -> list[bytes]:
    """Return an environment as `NAME=value` bytes for execve(2)."""
    return [os.fsencode(f"{name}={value}") for name, value in values.items()]
