"""Every policy file that would count here: all mistakes, and what is valid but not enforced yet.

A start stops at the first file that is wrong; `cloister check` goes on and reports on all of
them. Reads files, changes nothing, prints nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec

from cloister.audit.detect_rules import rules_of
from cloister.egress.rules import compile_guard, compile_ruleset
from cloister.errors import CloisterError, PolicyError, Problem, UnsupportedError, UsageError
from cloister.policy.document import Document, read
from cloister.policy.load import load_document, load_preset, load_project
from cloister.policy.merge import ResolvedAgent, resolve
from cloister.policy.model import Llm, Preset
from cloister.policy.presets import all_presets, builtin_presets
from cloister.runs import login_files
from cloister.runs.credentials_plan import planned
from cloister.runs.credentials_warnings import warnings
from cloister.runs.model_keys import login_warnings
from cloister.runs.paths import SYSTEM_POLICY, Paths
from cloister.runs.policies import MAX_BYTES, PROJECT_FILE, PolicyFiles, read_trusted
from cloister.runs.signing_review import unreachable
from cloister.runs.unenforced import refusals

Kind = Literal["user policy", "system policy", "policy", "project", "preset"]


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """One file that was looked at."""

    path: str
    kind: Kind
    agents: tuple[str, ...] = ()
    good: bool = True


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One mistake or warning."""

    message: str
    where: str = ""
    remedy: str = ""


class Report(msgspec.Struct, kw_only=True):
    """Everything that was found, in the order of the files."""

    files: list[Checked]
    problems: list[Finding]
    warnings: list[Finding]


class Checker:
    """Looks at files one by one; mistakes and warnings add up in `report`."""

    def __init__(self, paths: Paths, uid: int) -> None:
        """Look at nothing yet."""
        self._paths = paths
        self._uid = uid
        self.report = Report(files=[], problems=[], warnings=[])
        self._logins = login_files.describer(self._paths.logins)

    def everything(self, workspace: str) -> Report:
        """Check the system's, the user's and a project's file, and the user's presets."""
        documents = [
            self._policy(SYSTEM_POLICY, "system policy", lambda: _text(SYSTEM_POLICY, 0)),
            self._policy(self._paths.policy, "user policy", lambda: _text(self._paths.policy, self._uid)),
        ]
        for name in sorted(self._preset_texts()):
            path = f"{self._paths.presets}/{name}.toml"
            self._attempt(path, "preset", partial(self._own_preset, path))
        agents = sorted({name for document in documents if document for name in document.tables.get("agents", {})})
        if not self.report.files:
            self.report.problems.append(
                Finding(message="there is no policy yet", where=self._paths.policy, remedy="cloister init")
            )
        elif not self.report.problems:
            self._together(agents, workspace)
        return self.report

    def file(self, path: str) -> Report:
        """Check one file for itself; its name and place say what it is. Drafts may belong to anybody."""
        if Path(path).name == PROJECT_FILE:
            self._attempt(path, "project", lambda: self._project(path))
        elif str(Path(path).absolute().parent) == self._paths.presets:
            self._attempt(path, "preset", lambda: self._preset(path, _read(path)))
        else:
            self._policy(path, "policy", lambda: _read(path))
        return self.report

    def _policy(self, path: str, kind: Kind, text: Callable[[], bytes | None]) -> Document | None:
        return self._attempt(path, kind, lambda: self._load_policy(path, kind, text()))

    def _load_policy(self, path: str, kind: Kind, text: bytes | None) -> Document | None:
        if text is None:
            return None
        presets = self._presets()
        document = read(text, path)
        policy = load_document(document, preset_names=tuple(presets))
        for name in policy.agents:
            resolved = resolve(document, name, presets=presets)
            self._agent(resolved)
            if kind == "user policy" and resolved.agent.isolation == "unit":
                self._own_unit(resolved)
        rules_of(policy.audit)
        for name, what, remedy in login_warnings(policy.providers, self._logins):
            self._warn(Finding(message=what, where=document.where(("providers", name)), remedy=remedy))
        return document

    def _agent(self, resolved: ResolvedAgent) -> None:
        """Compile what a start would compile, and note what it would refuse in this version."""
        rules = compile_ruleset(resolved.agent.egress, agent=resolved.name)
        guard = compile_guard(resolved.agent.egress, agent=resolved.name)
        for missing in unreachable(resolved.agent, rules, guard):
            what = f"the agent {resolved.name!r} may log in to {missing.place}, which its egress rules do not allow"
            where = resolved.source(("credentials", missing.credential, "hosts"))
            remedy = f"add {missing.line} to allow in [agents.{resolved.name}.egress]"
            self._warn(Finding(message=what, where=where, remedy=remedy))
        planned(resolved.agent)
        for warned in warnings(resolved.agent, resolved.name, self._paths.home, (rules, guard)):
            self._warn(Finding(message=warned.message, where=resolved.source(warned.at), remedy=warned.remedy))
        for name, what, remedy in login_files.warnings(resolved.agent, resolved.name, self._logins):
            self._warn(Finding(message=what, where=resolved.source(("credentials", name)), remedy=remedy))
        if resolved.agent.llm != Llm() and not resolved.agent.llm.providers:
            what = f"the agent {resolved.name!r} has limits for models, and no provider: it reaches none of them"
            where = resolved.source(("llm",))
            self._warn(Finding(message=what, where=where, remedy='add providers = ["NAME"], and [providers.NAME]'))
        for error in (*refusals(resolved.agent), *_guest_refusals(resolved, self._paths)):
            what = f"the agent {resolved.name!r} will not start: {error.message}"
            where = resolved.source(tuple(error.where.strip(".").split(".")))
            self._warn(Finding(message=what, where=where, remedy=error.remedy))

    def _own_unit(self, resolved: ResolvedAgent) -> None:
        """Say of an agent of the user's own that only the system's policy can make it a system user."""
        if self._system_has(resolved.name):
            return
        what = f"the agent {resolved.name!r} will not start: only the system's policy gives an agent a system user"
        remedy = 'isolation = "namespace", or ask the owner of this machine: sudo cloister setup'
        self._warn(Finding(message=what, where=resolved.source(("isolation",)), remedy=remedy))

    def _system_has(self, name: str) -> bool:
        """Tell whether the system's policy, where it is good, has an agent of this name as a unit."""
        try:
            return PolicyFiles(self._paths, self._uid).system_isolation(name) == "unit"
        except PolicyError:
            return False

    def _warn(self, finding: Finding) -> None:
        if finding not in self.report.warnings:
            self.report.warnings.append(finding)

    def _own_preset(self, path: str) -> None:
        self._preset(path, _text(path, self._uid))

    def _preset(self, path: str, text: bytes | None) -> None:
        if text is not None:
            load_preset(text, path)

    def _project(self, path: str) -> None:
        """Check a project file by itself, and against each agent of the policy when there is a good one."""
        load_project(_read(path) or b"", path)
        files = PolicyFiles(self._paths, self._uid)
        try:
            names = sorted(files.document().tables.get("agents", {}))
        except PolicyError:
            return
        self._tighten(files, names, str(Path(path).absolute().parent))

    def _together(self, agents: list[str], workspace: str) -> None:
        """Check what files say to each other: the system's ceiling, and the project's tightening."""
        files = PolicyFiles(self._paths, self._uid)
        for name in agents:
            self._collect(partial(files.resolve, name))
        project = f"{workspace}/{PROJECT_FILE}"
        if workspace and os.path.lexists(project):
            self._attempt(project, "project", lambda: self._project(project))

    def _tighten(self, files: PolicyFiles, names: list[str], workspace: str) -> None:
        for name in names:
            self._collect(partial(files.resolve, name, workspace=workspace))

    def _attempt(self, path: str, kind: Kind, look: Callable[[], Document | None]) -> Document | None:
        """Look at a file; list it when it is there, with its mistakes."""
        before = len(self.report.problems)
        document = self._collect(look)
        good = len(self.report.problems) == before
        if good and not Path(path).exists():
            return None
        agents = tuple(sorted(document.tables.get("agents", {}))) if document else ()
        self.report.files.append(Checked(path=path, kind=kind, agents=agents, good=good))
        return document

    def _collect(self, look: Callable[[], Document | None] | Callable[[], ResolvedAgent]) -> Document | None:
        try:
            found = look()
        except PolicyError as error:
            for problem in error.problems:
                finding = Finding(message=problem.message, where=problem.where, remedy=problem.remedy)
                if finding not in self.report.problems:
                    self.report.problems.append(finding)
            return None
        return found if isinstance(found, Document) else None

    def _presets(self) -> Mapping[str, Preset]:
        """Return built-in presets and the user's good ones; the bad ones are reported under their own name."""
        texts = {}
        for name, text in self._preset_texts().items():
            try:
                load_preset(text, name)
            except PolicyError:
                continue
            texts[name] = text
        return all_presets(texts) if texts else builtin_presets()

    def _preset_texts(self) -> dict[str, bytes]:
        folder = Path(self._paths.presets)
        try:
            found = sorted(folder.glob("*.toml"))
            return {path.stem: path.read_bytes()[: MAX_BYTES + 1] for path in found}
        except OSError:
            return {}


def _guest_refusals(resolved: ResolvedAgent, paths: Paths) -> Iterator[CloisterError]:
    """Yield what there is not for an agent's guest, beside what no guest can keep: memory, an image."""
    if resolved.agent.isolation != "microvm":
        return
    from cloister.runs.compile_vm import image_of, memory_of
    from cloister.runs.images import places, store_of

    try:
        memory_of(resolved.agent)
    except UnsupportedError as error:
        yield error
    name = image_of(resolved.agent, resolved.preset)
    try:
        store_of(places(os.environ, paths, resolved.policy.images), name).path(name)
    except UsageError as error:
        yield UsageError(error.reference, error.message, where=".microvm.image", remedy=error.remedy)


def as_error(report: Report) -> PolicyError:
    """Return the problems as the error that a start would raise."""
    return PolicyError([Problem(one.message, one.where, one.remedy) for one in report.problems])


def _text(path: str, uid: int) -> bytes | None:
    source = read_trusted(path, uid)
    return source.text if source else None


def _read(path: str) -> bytes | None:
    try:
        with Path(path).open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        problem = Problem(f"the file cannot be read: {error.strerror}", path, "cloister check FILE")
        raise PolicyError([problem], reference="policy-unreadable") from error
