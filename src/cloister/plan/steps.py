"""The closed union of steps a plan is made of, and the plan itself.

A step is a small frozen value that says one thing to do; `describe` puts it into one line for
people. It holds no secret, no file descriptor and no process id, so a plan can be printed,
stored before its first step runs, and undone from the file alone. Running
and undoing steps is for `host/apply.py`.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import msgspec

from cloister.plan.unit import UnitLaunch
from cloister.plan.vm import VmLaunch
from cloister.plan.workspace import Placeholder


class Step(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="step"):
    """What all steps share."""


class MakeDirectory(Step, frozen=True, tag="make-directory"):
    """Make a directory of ours. `kept` ones survive the run (an agent's history)."""

    path: str
    mode: int = 0o700
    kept: bool = False

    def describe(self) -> str:
        """Return one line for people."""
        return f"make directory {self.path} ({self.mode:04o}{', kept' if self.kept else ''})"


class WriteFile(Step, frozen=True, tag="write-file"):
    """Write a file of ours, inside a directory made by an earlier step."""

    path: str
    text: str
    mode: int = 0o600

    def describe(self) -> str:
        """Return one line for people."""
        return f"write {len(self.text.encode())} bytes to {self.path}"


class WriteBytes(Step, frozen=True, tag="write-bytes"):
    """Write a file of ours that is no text, such as a public key."""

    path: str
    data: bytes
    mode: int = 0o600

    def describe(self) -> str:
        """Return one line for people."""
        return f"write {len(self.data)} bytes to {self.path}"


class MakeLink(Step, frozen=True, tag="make-link"):
    """Make a symbolic link of ours, such as a program's name on the agent's PATH; it leads somewhere inside."""

    path: str
    target: str

    def describe(self) -> str:
        """Return one line for people."""
        return f"link {self.path} to {self.target}"


class TrustBundle(Step, frozen=True, tag="trust-bundle"):
    """Write the certificates that programs in the sandbox trust: the system's, and that of this user's authority."""

    path: str
    roots: str = ""
    """The system's bundle; empty where it has none that is known here."""
    mode: int = 0o600

    def describe(self) -> str:
        """Return one line for people."""
        return f"write the trusted certificates ({self.roots or 'no system bundle'} and our own) to {self.path}"


class PlaceholderFile(Step, frozen=True, tag="placeholder-file"):
    """Write a file in which a product finds a login: `{placeholder}` becomes that of a credential."""

    path: str
    text: str
    credential: str
    mode: int = 0o600

    def describe(self) -> str:
        """Return one line for people."""
        return f"write the placeholder of {self.credential} to {self.path}"


class Listen(Step, frozen=True, tag="listen"):
    """Open the Unix socket on which the run's egress is served. The socket is the run's identity."""

    path: str
    mode: int = 0o600
    """0666 where the agent has another uid; the directory above is nobody else's."""

    def describe(self) -> str:
        """Return one line for people."""
        return f"serve egress on {self.path}"


class ListenAgent(Step, frozen=True, tag="listen-agent"):
    """Open the Unix socket on which a person's own agent is served, filtered to named keys and uses."""

    path: str
    kind: Literal["ssh", "gpg"]
    words: tuple[str, ...] = ()
    """Which keys may do what, for people."""
    mode: int = 0o600
    """As that of `Listen`."""

    def describe(self) -> str:
        """Return one line for people."""
        return f"serve the {self.kind}-agent on {self.path}: {'; '.join(self.words)}"


class CarryPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file or directory that must exist below an agent's state to be mounted over."""

    name: str
    kind: Literal["file", "directory"]


class Placeholders(Step, frozen=True, tag="placeholders"):
    """Make what is absent but must be mounted over; removed after the run, when still ours."""

    workspace: str
    points: tuple[Placeholder, ...]

    def describe(self) -> str:
        """Return one line for people."""
        return f"hold {len(self.points)} absent paths of {self.workspace} while the run lasts"


class CarryPoints(Step, frozen=True, tag="carry-points"):
    """Make the places below an agent's own state directory onto which carried files are mounted."""

    root: str
    points: tuple[CarryPoint, ...]

    def describe(self) -> str:
        """Return one line for people."""
        return f"make {len(self.points)} mount points below {self.root}"


class SeedFile(Step, frozen=True, tag="seed-file"):
    """Write a file below an agent's own state where there is none yet, such as "the welcome screen was seen"."""

    root: str
    name: str
    text: str

    def describe(self) -> str:
        """Return one line for people."""
        return f"write {self.root}/{self.name}, unless it exists"


class MergeSettings(Step, frozen=True, tag="merge-settings"):
    """Write a product's settings for this run: the policy's over those of the home, which are read only then."""

    path: str
    source: str
    """The home's file, without links; empty without one."""
    settings: dict[str, Any]
    """The policy's."""
    form: Literal["json", "toml"] = "json"
    models: bool = False
    """It is a list of model providers: the home's is shown without its keys."""
    mode: int = 0o600

    def describe(self) -> str:
        """Return one line for people."""
        return f"write {self.path}, the policy's settings over {self.source or 'nothing'}"


class IdentityTokens(Step, frozen=True, tag="identity-tokens"):
    """Keep signed tokens of the run in files, renewed while it lives and void after it. No token stands here."""

    directory: str
    """In the box directory, so that the agent can read them."""
    user: str
    """The user, as the tokens name it."""
    audiences: tuple[str, ...]
    """Third parties there is a token for, besides our own services."""
    lifetime_s: int
    mode: int = 0o400
    """0444 where the agent has another uid."""

    def describe(self) -> str:
        """Return one line for people."""
        named = ", ".join(self.audiences)
        return f"keep identity tokens of {self.lifetime_s} s in {self.directory}, for cloister and {named}"


class Limit(Step, frozen=True, kw_only=True):
    """What both ways to limit a whole run share: bytes, tasks, and microseconds of CPU per 100 ms."""

    memory_bytes: int | None = None
    tasks: int | None = None
    cpu_quota_us: int | None = None

    def values(self) -> dict[str, str]:
        """Return file names of a cgroup (v2) and what shall stand in them (cgroup-v2.rst)."""
        wanted = {
            "memory.max": self.memory_bytes,
            "pids.max": self.tasks,
            "cpu.max": None if self.cpu_quota_us is None else f"{self.cpu_quota_us} 100000",
        }
        return {name: str(value) for name, value in wanted.items() if value is not None}

    def _amounts(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.values().items())


class LimitCgroup(Limit, frozen=True, kw_only=True, tag="limit-cgroup"):
    """Make a cgroup (v2) for the run in a directory where we may, and move its first process there."""

    path: str

    def describe(self) -> str:
        """Return one line for people."""
        return f"limit in cgroup {self.path}: {self._amounts()}"


class LimitScope(Limit, frozen=True, kw_only=True, tag="limit-scope"):
    """Have our systemd manager make a scope for the run's first process (systemd.scope(5))."""

    unit: str

    def describe(self) -> str:
        """Return one line for people."""
        return f"limit in systemd scope {self.unit}: {self._amounts()}"


class Overlay(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An overlayfs mount made in the run's own user namespace before bubblewrap starts."""

    lower: str
    upper: str
    work: str
    target: str


class Hold(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A mount inside the workspace, made before bubblewrap starts, in the run's own user and mount namespace.

    bubblewrap's user namespace is a child of that one, so there the mount can neither be taken away nor changed
    (mount_namespaces(7), "locked"). `source` is the target itself when empty.
    """

    mode: Literal["ro", "rw"]
    target: str
    source: str = ""

    def describe(self) -> str:
        """Return one line for people."""
        return f"{self.mode} {self.target}" + (f" from {self.source}" if self.source else "")


class Launch(Step, frozen=True, tag="launch"):
    """Start the sandbox: the argv of bubblewrap, then what its first process needs to know.

    `argv` names descriptors by number: 3 is the seccomp filter, 4 the channel to the broker.
    With a `ruleset` the run has a network namespace of its own: `nft` loads the rules there, `pasta` (its argv
    without the process to attach to) connects it. 5 is the ruleset's descriptor then; under systemd both are
    started in a unit (`UnitNetwork`).
    `environment` holds literal values from the policy; `inherit` names variables whose values
    the caller's request brings, so that no value of theirs stands in the plan.
    """

    argv: tuple[str, ...]
    command: tuple[str, ...]
    directory: str
    environment: dict[str, str]
    inherit: tuple[str, ...] = ()
    pty: bool = False
    seccomp: str = ""
    overlays: tuple[Overlay, ...] = ()
    holds: tuple[Hold, ...] = ()
    """In the order in which they are made, after the overlays."""
    ruleset: str = ""
    nft: str = ""
    """Path of nft."""
    pasta: tuple[str, ...] = ()
    runtime_s: float | None = None
    unit: UnitLaunch | None = None
    """With `isolation = "unit"`; `argv` is that of the unit's first process, the inner half of the shim."""
    vm: VmLaunch | None = None
    """With `isolation = "microvm"`; `argv` is that of the monitor's jail, with the shim as keeper in it."""

    def describe(self) -> str:
        """Return one line for people."""
        return f"launch {' '.join(self.command)} in {self.directory}"


class PlannedCredential(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A secret the agent may use without holding it: its reference, where it goes and how, never its value."""

    name: str
    secret: str
    """The reference."""
    hosts: tuple[str, ...]
    """`host:port` of each place it is bound to; TLS to these ends at the broker."""
    how: str
    variables: tuple[str, ...] = ()
    """Where the agent finds the placeholder."""
    methods: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    mask: bool = False

    def describe(self) -> str:
        """Return one line for people."""
        limits = " ".join((*self.methods, *self.paths))
        parts = [f"{self.name}: {self.secret}", f"to {', '.join(self.hosts) or 'nowhere'}", f"as {self.how}"]
        parts += [f"placeholder in {', '.join(self.variables)}"] if self.variables else ["put in by the broker alone"]
        parts += [f"for {limits} only"] if limits else []
        return "; ".join([*parts, *(["masked in answers"] if self.mask else [])])


AnyStep = (
    MakeDirectory
    | WriteFile
    | WriteBytes
    | MakeLink
    | TrustBundle
    | PlaceholderFile
    | Listen
    | ListenAgent
    | Placeholders
    | CarryPoints
    | SeedFile
    | MergeSettings
    | IdentityTokens
    | LimitCgroup
    | LimitScope
    | Launch
)


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that will be done for one run, and what was decided on the way."""

    run: str
    """The run's id; names its directories."""
    agent: str
    preset: str
    isolation: str
    workspace: str
    policy_digest: str
    profile: str = ""
    """The profile laid over the agent, so that a reload finds the same table again."""
    project: str = ""
    """Where the project's own policy file is looked for: the same place for as long as the run lasts."""
    steps: tuple[AnyStep, ...]
    asked: tuple[str, ...] = ()
    """The command as it was asked for: without the resolved path and the flags that are put in."""
    egress: tuple[str, ...] = ()
    """The egress rules in words, as `explain` shows them."""
    credentials: tuple[PlannedCredential, ...] = ()
    """Secrets the agent may use, by reference."""
    models: tuple[str, ...] = ()
    """Providers, models and budgets in words; keys by reference."""
    limits: tuple[str, ...] = ()
    """Which limit is enforced by what: `memory 4 GiB: cgroup`."""
    opt_outs: tuple[str, ...] = ()
    """Named weakenings the policy asked for; they go into the receipt."""
    notices: tuple[str, ...] = ()
    """What the host cannot give and the policy does not insist on."""

    @property
    def launch(self) -> Launch:
        """The one step that starts the sandbox."""
        return next(step for step in self.steps if isinstance(step, Launch))

    def recorded(self) -> Plan:
        """Return the plan as it is written down: bytes of its command that are no text are escaped (`plain`)."""
        words = self.launch.command
        if plain(words) == words:
            return self
        launch = msgspec.structs.replace(self.launch, command=plain(words))
        return msgspec.structs.replace(
            self, steps=tuple(launch if isinstance(step, Launch) else step for step in self.steps)
        )

    def digest(self) -> str:
        """Return the SHA-256 of the plan with the run's id taken out: equal plans, equal digests."""
        text = msgspec.json.encode(self.recorded(), order="sorted")
        return hashlib.sha256(text.replace(self.run.encode(), b"RUN")).hexdigest()


def plain(words: tuple[str, ...]) -> tuple[str, ...]:
    """Return arguments as text that any file holds: bytes that are no UTF-8 (PEP 383) become `x` escapes."""
    return tuple(_shown(word) for word in words)


def _shown(word: str) -> str:
    if word.isascii():
        return word
    return word.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
