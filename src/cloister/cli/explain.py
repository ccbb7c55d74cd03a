"""`cloister explain`: would this path or host be within an agent's reach, and by which rule?"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from cloister.cli import output, records
from cloister.cli.arguments import Parser
from cloister.cli.plan import kitchen, prepared_for
from cloister.egress.decision import Target, decide
from cloister.egress.hosts import HostError, parse_authority, parse_host
from cloister.errors import UsageError
from cloister.host.agent_program import ProgramMissingError
from cloister.isolation.inner import MODEL_PORT
from cloister.llm.upstreams import compile_upstream
from cloister.plan.unit import AGENTS
from cloister.policy.values import check_read_path
from cloister.runs.approvals import Approvals
from cloister.runs.credentials_plan import credentials_for
from cloister.runs.explain import Access, Explainer, look
from cloister.runs.explain_unit import unit_mounts
from cloister.runs.prepare import Kitchen, Prepared
from cloister.runs.reasons import Reasons
from cloister.runs.request import RunRequest

_HTTP = 80
_HTTPS = 443
_SSH = 22


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` prints."""

    question: str
    kind: str
    """`path` or `host`."""
    allowed: bool
    """Readable, or reachable."""
    writable: bool = False
    exists: bool = False
    path: str = ""
    """The path in the sandbox, links followed."""
    target: str = ""
    """`host:port`, in its canonical spelling."""
    protocol: str = ""
    reason: str = ""
    rule: str = ""
    where: str = ""
    explanation: str = ""
    remedy: str = ""
    credentials: tuple[str, ...] = ()
    """Credentials bound to the host: TLS to it ends at the broker, which puts their secrets in."""


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "explain",
        "Say whether a path or a host is within an agent's reach, and by which rule.",
        prose=(
            "A word with a slash, or one that exists here, is a path; everything else is a host. The answer about a "
            "path comes from the mounts that would be made for a run started here. Ports other than 80 are taken for "
            "tunnels, as TLS is, in which methods and paths cannot be seen unless a credential is bound to the host; "
            "http:// in front, --method or --path make it a plain request on any port but 443. Names are not "
            "resolved: their addresses are judged when they are dialled."
        ),
        examples=(
            ("cloister explain claude ~/.ssh/id_ed25519", "would it be readable?"),
            ("cloister explain claude api.github.com", "would it be reachable?"),
        ),
        exits=(("1", "not readable, not reachable, or only after a question"),),
    )
    verb.add_argument("agent", metavar="AGENT", help="an agent of the policy")
    verb.add_argument("what", metavar="PATH|HOST[:PORT]", help="a path, a host, an address, or an address of the web")
    verb.add_argument("--method", default="", help="HTTP method of a plain request")
    verb.add_argument("--path", default="", help="path of a plain request")
    verb.add_argument("--profile", metavar="NAME", default="", help="as in `run`")
    verb.add_argument("-C", "--directory", metavar="DIR", default=".", help="as if started in DIR")
    verb.add_argument("--write", action="store_true", help="the question is whether the path is writable")
    verb.json_option(
        "question, kind, allowed, writable, exists, path, target, protocol, reason, rule, where, explanation, remedy, "
        "credentials"
    )
    return verb


def main(argv: list[str]) -> int:
    """Print the answer; return 0 for yes, 1 for no.

    Raises:
        CloisterError: what would stop a run here.
    """
    options = parser().read(argv)
    places = records.places()
    cook = kitchen()
    prepared = _prepare(cook, options)
    written = cook.policies.resolve(options.agent, options.profile)
    unit = prepared.plan.launch.unit is not None
    home = prepared.plan.launch.environment["HOME"] if unit else places.home
    reasons = Reasons(written, prepared.layout, home, AGENTS if unit else places.agents)
    if _is_path(options.what):
        answer = about_path(options.what, prepared, reasons)
        good = answer.writable if options.write else answer.allowed
    else:
        kept = Approvals(places.decisions)
        answer = about_host(options.what, (options.method.upper(), options.path), prepared, reasons, kept)
        good = answer.allowed
    if options.json:
        output.print_json(answer)
    else:
        print(_page(answer))
    return 0 if good else 1


def _prepare(cook: Kitchen, options: argparse.Namespace) -> Prepared:
    """Prepare the run the question is about; a program that is not installed changes no other answer."""
    request = RunRequest(
        agent=options.agent,
        directory=str(Path(options.directory).absolute()),
        profile=options.profile,
        environment=dict(os.environ),
    )
    try:
        return prepared_for(cook, request)
    except ProgramMissingError:
        return prepared_for(cook, msgspec.structs.replace(request, words=("/usr/bin/true",), replaced=True))


def _is_path(word: str) -> bool:
    return "://" not in word and ("/" in word or word.startswith(("~", ".")) or Path(word).exists())


def about_path(word: str, prepared: Prepared, reasons: Reasons) -> Answer:
    """Answer about a path, relative ones from where the agent would start."""
    path = str(Path(prepared.plan.launch.directory) / Path(word).expanduser())
    unit = prepared.plan.launch.unit
    mounts = unit_mounts(prepared.plan, records.places().home) if unit else ()
    if prepared.plan.launch.vm:
        from cloister.runs.explain_vm import guest_mounts

        mounts = guest_mounts(prepared.plan, prepared.layout)
    access = Explainer(prepared.plan, look, mounts).ask(path)
    return Answer(
        question=path,
        kind="path",
        allowed=access.readable,
        writable=access.writable,
        exists=access.exists,
        path=access.path,
        rule=access.mount,
        where=reasons.of_path(access),
        explanation=access.note,
        remedy=_path_remedy(access, prepared),
    )


def _path_remedy(access: Access, prepared: Prepared) -> str:
    """Return the edit that would show a path, where the policy may say so and the host's user could read it."""
    if access.exists or access.writable or look(access.path).readable is False:
        return ""
    try:
        check_read_path(access.path)
    except ValueError:
        return ""
    return f'add "{access.path}" to read in [agents.{prepared.plan.agent}.filesystem]'


def about_host(word: str, request: tuple[str, str], prepared: Prepared, reasons: Reasons, kept: Approvals) -> Answer:
    """Answer about a host, an authority or a web address; `request` is the method and path of a plain request.

    Raises:
        UsageError: it is no host.
    """
    scheme, host, found = "", word, ""
    method, path = request
    if "://" in word:
        parts = urlsplit(word)
        scheme, host, found = parts.scheme, parts.netloc.rpartition("@")[2], parts.path
    try:
        where, port = parse_authority(host, _HTTP if scheme in {"http", "ws"} else _HTTPS)
    except HostError as error:
        remedy = "a path holds a slash: ./NAME; a host is NAME, NAME:PORT or an address"
        raise UsageError("host-invalid", error.explanation, where=word, remedy=remedy) from None
    plain = scheme in {"http", "ws"} or (not scheme and (port == _HTTP or (port != _HTTPS and bool(method or path))))
    bound = () if plain else credentials_for(prepared.agent, where.text, port)
    request_line = (method or "GET", path or found or "/")
    target = Target("http" if plain else "connect", where, port, *(request_line if plain else ()))
    if bound:  # its requests are read
        target = Target("https", where, port, *request_line)
    if served := _models_at(where.text, port, prepared):
        return served
    verdict = decide(prepared.ruleset, prepared.guard, target)
    answered = kept.find(prepared.plan.agent, where.text, port) if verdict.action == "ask" else ""
    explanation = verdict.explanation
    if verdict.action == "ask":
        explanation = (
            f"you answered {answered!r} before"
            if answered
            else "you are asked, and a run without a terminal is refused"
        )
    called, signed = _providers_at(where.text, port, prepared), _keys_for(where.text, port, prepared)
    explanation = "; ".join(part for part in (explanation, *called, *signed) if part)
    return Answer(
        question=word,
        kind="host",
        allowed=verdict.allowed or answered == "always",
        target=target.authority,
        protocol=f"{target.protocol} {target.method} {target.path}" if target.visible else "tunnel",
        reason=verdict.reason,
        rule=verdict.rule,
        where=reasons.of_rule(verdict.rule, prepared.agent.egress),
        explanation=explanation,
        remedy="" if called else verdict.remedy,
        credentials=bound,
    )


def _models_at(host: str, port: int, prepared: Prepared) -> Answer | None:
    """Return the answer about the place inside where the run's own models are served."""
    if not prepared.plan.models or host not in ("127.0.0.1", "localhost") or port != MODEL_PORT:
        return None
    return Answer(
        question=f"{host}:{port}", kind="host", allowed=True, target=f"{host}:{port}", protocol="model calls",
        reason="models-of-the-run", where=f"[agents.{prepared.plan.agent}.llm]",
        explanation="; ".join(prepared.plan.models),
    )  # fmt: skip


def _providers_at(host: str, port: int, prepared: Prepared) -> list[str]:
    """Return words about the providers there: the broker makes their calls, so no rule is needed."""
    named = [(name, prepared.policy.providers[name]) for name in prepared.agent.llm.providers]
    upstreams = [compile_upstream(name, provider) for name, provider in named]
    found = [one.name for one in upstreams if (one.host, one.port) == (host, port)]
    return [f"its model calls get there through the broker (provider {name}) and need no rule" for name in found]


def _keys_for(host: str, port: int, prepared: Prepared) -> list[str]:
    """Return words about the keys that log in there."""
    named = prepared.agent.credentials.items()
    places = {name: [parse_authority(one, _SSH) for one in key.hosts] for name, key in named if "ssh" in key.uses}
    return [f"the key {name} logs in there" for name, hosts in places.items() if (parse_host(host), port) in hosts]


def _page(answer: Answer) -> str:
    if answer.kind == "path":
        seen = "readable" if answer.allowed else "not readable"
        seen = seen if answer.exists else "not there"
        head = f"{answer.question}: {seen}, {'writable' if answer.writable else 'not writable'}"
        facts = [("really", answer.path if answer.path != answer.question else ""), ("mount", answer.rule)]
    else:
        seen = "reachable" if answer.allowed else "not reachable"
        head = f"{answer.target}: {seen} ({answer.protocol})"
        facts = [("reason", answer.reason), ("rule", answer.rule)]
        facts += [("credentials", ", ".join(answer.credentials))]
    facts += [("because", answer.where), ("note", answer.explanation), ("try", answer.remedy)]
    shown = output.colour(output.clean(head), "green" if answer.allowed else "red")
    return "\n".join([shown, *(f"  {line}" for line in output.pairs(facts).splitlines())])
