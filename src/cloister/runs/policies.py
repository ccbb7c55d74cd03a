"""The policy files of one user, read again when they change: what `run`, `plan`, `check` and `explain` share.

A file counts only when nobody else can write it: owned by the user or root, not writable by
group or others, no symlink in place of the file. A broken file is an error at the next start,
never the old value and never a default; running sandboxes keep the policy they started with
until a good one is there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from cloister.errors import PolicyError, Problem, UnsupportedError
from cloister.policy.document import Document, read
from cloister.policy.load import load_document, load_project
from cloister.policy.merge import ResolvedAgent, resolve
from cloister.policy.model import Audit, Images, Ledger, Policy, Preset
from cloister.policy.presets import all_presets
from cloister.policy.tighten import tighten, tighten_project
from cloister.policy.users import admit
from cloister.runs.paths import SYSTEM_POLICY, Paths
from cloister.runs.unenforced import refuse_tables

PROJECT_FILE = ".cloister.toml"

MAX_BYTES = 1 << 20


class Source(NamedTuple):
    """The text of one policy file."""

    path: str
    text: bytes


def read_trusted(path: str, uid: int) -> Source | None:
    """Return a policy file's content, or None when there is no such file.

    Raises:
        PolicyError: it is there but cannot be trusted or read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _refuse(path, f"cannot be read: {error.strerror}", "") from error
    with os.fdopen(descriptor, "rb") as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise _refuse(path, "is not a regular file", "")
        if info.st_uid not in (uid, 0):
            raise _refuse(path, "belongs to another user", f"chown {uid} {path}")
        if info.st_mode & 0o022:
            raise _refuse(path, "can be written by others", f"chmod go-w {path}")
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise _refuse(path, "is larger than 1 MiB", "")
    return Source(path, text)


def stamp(path: str) -> tuple[int, int, int]:
    """Return what changes when the file does: time, size and inode."""
    try:
        info = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return (info.st_mtime_ns, info.st_size, info.st_ino)


def digest(sources: list[Source]) -> str:
    """Return the SHA-256 over all sources, names included."""
    total = hashlib.sha256()
    for source in sources:
        total.update(f"{len(source.text)}:{source.path}\n".encode("utf-8", "surrogateescape") + source.text)
    return total.hexdigest()


def _refuse(path: str, what: str, remedy: str) -> PolicyError:
    return PolicyError([Problem(f"the policy file {what}", path, remedy)], reference="policy-untrusted")


class PolicyFiles:
    """The user's policy, presets and decisions, the system's policy, and a project's file, as one answer."""

    def __init__(self, paths: Paths, uid: int, *, policy: str = "", system: str = SYSTEM_POLICY) -> None:
        """Read nothing yet.

        Args:
            paths: where the user's files are.
            uid: the user; files of others but root do not count.
            policy: a file to take in the place of the user's.
            system: the system's policy; empty for the system's own broker, whose main file it is.
        """
        self._paths = paths
        self._system_path = system
        self._policy = policy or paths.policy
        self._uid = uid
        self._stamps: tuple[tuple[int, int, int], ...] = ()
        self._document: Document | None = None
        self._documents: list[Document] = []
        self._policies: list[Policy] = []
        self._system: Document | None = None
        self._own_text = b""
        self._only_system = False
        self._presets: Mapping[str, Preset] = {}
        self._resolved: dict[tuple[str, str], ResolvedAgent] = {}
        self.digest = ""

    def resolve(self, agent: str, profile: str = "", *, workspace: str = "") -> ResolvedAgent:
        """Return one agent as it may run in a workspace.

        Raises:
            PolicyError: any file is wrong, missing where it is needed, or tries to widen.
        """
        self._refresh()
        key = (agent, profile)
        if key not in self._resolved:
            self._resolved[key] = self._resolve(agent, profile)
        resolved = self._resolved[key]
        return self._tightened(resolved, workspace) if workspace else resolved

    def admit(self, user: str, agent: str) -> tuple[str, ...]:
        """Return the roots that `[users]` binds a user to, where a policy has that table.

        Raises:
            DeniedError: the user, or this agent for the user, is not named there.
        """
        self._refresh()
        found = [admit(policy, user, agent) for policy in self._policies]
        return tuple(root for one in found if one is not None for root in one.roots)

    def config_of(self, user: str, agent: str) -> str:
        """Return where `[users]` says that a user keeps an agent's configuration, below the home; mostly nothing."""
        self._refresh()
        for policy in self._policies:
            found = policy.users.get(user)
            config = found.config if found else ""
            if place := config if isinstance(config, str) else config.get(agent, ""):
                return place
        return ""

    def system_isolation(self, agent: str, profile: str = "") -> str:
        """Return the isolation that the system's policy asks for, before anything narrows it; empty without one there.

        Raises:
            PolicyError: as `resolve`.
        """
        self._refresh()
        system = self._document if self._only_system else self._system
        if system is None or agent not in system.tables.get("agents", {}):
            return ""
        return resolve(system, agent, profile, presets=self._presets).agent.isolation

    def own_text(self, agent: str) -> str:
        """Return the user's own policy where it says something of an agent that the system has; else nothing."""
        self._refresh()
        own = self._document
        if self._only_system or own is None or agent not in own.tables.get("agents", {}):
            return ""
        return self._own_text.decode()

    def refuse_ignored(self) -> None:
        """Refuse tables that nothing in this version obeys, where somebody wrote them.

        Raises:
            UnsupportedError: names the table, its file and line.
        """
        self._refresh()
        for document in self._documents:
            refuse_tables(document)
        own = self._document
        if self._system_path and own is not None and not self._only_system and own.tables.get("services"):
            raise UnsupportedError(
                "services-are-roots",
                "gateways are declared in the system's policy: they have system users of their own",
                where=own.where(("services",)),
                remedy=f"move [services] to {SYSTEM_POLICY}, then: sudo cloister apply",
            )
        if self._system_path and own is not None and not self._only_system and own.tables.get("microvm"):
            raise UnsupportedError(
                "bridge-is-roots",
                "the bridge of microVMs is declared in the system's policy",
                where=own.where(("microvm",)),
                remedy=f"move [microvm] to {SYSTEM_POLICY}, then: sudo cloister apply",
            )

    def ledger(self) -> Ledger:
        """Return where model calls are written down: as the system's policy says, else as the user's does."""
        self._refresh()
        return next((policy.ledger for policy in self._policies if policy.ledger != Ledger()), Ledger())

    def audit(self) -> Audit:
        """Return how a log of one's own is kept. When it cannot be written, runs stop if any policy says so.

        Raises:
            PolicyError: the policy is broken.
        """
        self._refresh()
        own = self._policies[-1].audit
        stops = any(policy.audit.on_failure == "stop" for policy in self._policies)
        return msgspec.structs.replace(own, on_failure="stop" if stops else "alarm")

    def images(self) -> Images:
        """Return which guest images count: only signed ones if any policy says so; keys of all policies are trusted.

        Raises:
            PolicyError: the policy is broken.
        """
        self._refresh()
        tables = [policy.images for policy in self._policies]
        return Images(
            require_signature=any(table.require_signature for table in tables),
            store=self._policies[-1].images.store,
            trust=tuple(dict.fromkeys(key for table in tables for key in table.trust)),
        )

    def presets(self) -> Mapping[str, Preset]:
        """Return every preset there is."""
        self._refresh()
        return self._presets

    def document(self) -> Document:
        """Return the user's policy as read."""
        self._refresh()
        assert self._document is not None  # noqa: S101  # `_refresh` raises otherwise
        return self._document

    def _refresh(self) -> None:
        """Read everything again when any file has changed."""
        paths = (self._policy, self._system_path, self._paths.presets)
        stamps = tuple(stamp(path) for path in (*paths, *_preset_files(self._paths)))
        if stamps == self._stamps and self._document is not None:
            return
        self._document = None
        user = read_trusted(self._policy, self._uid)
        system = read_trusted(self._system_path, 0) if self._system_path else None
        if user is None and system is None:
            raise PolicyError(
                [Problem("there is no policy yet", self._policy, "cloister init")], reference="policy-missing"
            )
        presets = _preset_sources(self._paths, self._uid)
        self._presets = all_presets({_stem(source.path): source.text for source in presets})
        sources = [source for source in (user, system, *presets) if source]
        main = user or system
        assert main is not None  # noqa: S101  # one of the two is there
        document = read(main.text, main.path)
        self._own_text = user.text if user else b""
        self._only_system = user is None
        self._system = read(system.text, system.path) if system and user else None
        self._documents = [one for one in (self._system, document) if one is not None]
        self._policies = [load_document(one, preset_names=tuple(self._presets)) for one in self._documents]
        self._resolved.clear()
        self.digest = digest(sources)
        self._document, self._stamps = document, stamps

    def _resolve(self, agent: str, profile: str) -> ResolvedAgent:
        """Resolve an agent; where the system has one of that name, it is the ceiling of the user's."""
        assert self._document is not None  # noqa: S101  # `_refresh` raises otherwise
        if self._system is None:
            return resolve(self._document, agent, profile, presets=self._presets)
        if agent not in self._system.tables.get("agents", {}):
            return self._with_images(resolve(self._document, agent, profile, presets=self._presets))
        ceiling = self._with_images(resolve(self._system, agent, profile, presets=self._presets))
        return dataclasses.replace(ceiling, agent=tighten(ceiling.agent, self._document, ("agents", agent)))

    def _with_images(self, resolved: ResolvedAgent) -> ResolvedAgent:
        return dataclasses.replace(resolved, policy=msgspec.structs.replace(resolved.policy, images=self.images()))

    def _tightened(self, resolved: ResolvedAgent, workspace: str) -> ResolvedAgent:
        """Apply `.cloister.toml` of the workspace: written by anybody with a commit, so it may only tighten."""
        path = f"{workspace}/{PROJECT_FILE}"
        source = _read_project(path)
        if source is None:
            return resolved
        _, document = load_project(source.text, path)
        return dataclasses.replace(resolved, agent=tighten_project(resolved.agent, resolved.name, document))


def project_text(workspace: str) -> str:
    """Return the text of a workspace's own policy file; empty without one.

    Raises:
        PolicyError: it is there but cannot be read, or is no text.
    """
    source = _read_project(f"{workspace}/{PROJECT_FILE}")
    try:
        return source.text.decode() if source else ""
    except UnicodeDecodeError:
        raise _refuse(source.path if source else "", "is not UTF-8", "") from None


def all_users_presets(paths: Paths, uid: int) -> Mapping[str, Preset]:
    """Return the built-in presets and the user's own, also where there is no policy yet.

    Raises:
        PolicyError: one of the user's is wrong, or could be written by others.
    """
    return all_presets({_stem(source.path): source.text for source in _preset_sources(paths, uid)})


def _preset_sources(paths: Paths, uid: int) -> list[Source]:
    return [source for path in _preset_files(paths) if (source := read_trusted(path, uid))]


def _preset_files(paths: Paths) -> list[str]:
    try:
        names = sorted(os.listdir(paths.presets))
    except OSError:
        return []
    return [f"{paths.presets}/{name}" for name in names if name.endswith(".toml")]


def _read_project(path: str) -> Source | None:
    """Read a project file without following a link; an unreadable one is an error, not an absent one."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _refuse(path, f"cannot be read: {error.strerror}", "") from error
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise _refuse(path, "is not a regular file", "")
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise _refuse(path, "is larger than 1 MiB", "")
    return Source(path, text)


def _stem(path: str) -> str:
    return os.path.basename(path).removesuffix(".toml")
