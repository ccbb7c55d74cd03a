"""`cloister identity`: keys of agents, public keys for verifiers, verifying, revoking, rotating, serving."""

from __future__ import annotations

import os
import socket
import sys
import time

import msgspec

from cloister.cli import output, records
from cloister.cli.arguments import Parser
from cloister.errors import DeniedError, UsageError
from cloister.host.key_store import read_private
from cloister.identity.tokens import TokenError
from cloister.runs.identity_files import DIRECTORY
from cloister.runs.identity_store import IdentityStore
from cloister.services.identity_api import revoke

_MAX_TOKEN = 16 * 1024


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "identity",
        "Show, verify, revoke and rotate the keys and tokens by which runs say who they are.",
        prose=(
            "A run whose policy has `identity.audiences` finds signed tokens (JWT, Ed25519) in "
            "$CLOISTER_IDENTITY_DIRECTORY, one file per audience and cloister.jwt for Cloister's own services. They "
            "are renewed while the run lives and void when it ends. `jwks` prints the public keys that verifiers such "
            "as Vault or a cloud's web identity need; publish it where your issuer says. Keys are kept encrypted "
            "under a master key: CLOISTER_MASTER_KEY, CLOISTER_MASTER_KEY_PATH, the systemd credential "
            "cloister-master-key, or one that is generated."
        ),
        examples=(
            ("cloister identity show", "keys, their ages, what was revoked"),
            ("cloister identity jwks > jwks.json", "for verifiers elsewhere"),
            ("cloister identity revoke run ID", "no token of that run is worth anything from now on"),
            ("cloister identity verify - < FILE", "what a token proves"),
        ),
    )
    verbs = verb.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=_Action)
    show = verbs.add_parser("show", help="print keys, ages and revocations")
    show.add_argument("--json", action="store_true", help="print JSON with the keys trust_domain, issuer, keys, ...")
    verbs.add_parser("jwks", help="print the public keys (RFC 7517)")
    check = verbs.add_parser("verify", help="say what a token proves; exit 77 when it proves nothing")
    check.add_argument("token", metavar="TOKEN", help="the token, or - to read it from standard input")
    check.add_argument("--audience", default="cloister", help="for whom it must be (cloister)")
    check.add_argument("--run", default="", help="the run it must belong to")
    check.add_argument("--agent", default="", help="the agent it must belong to")
    check.add_argument("--require-digest", default="", metavar="SHA256", help="the policy it must come from")
    check.add_argument("--json", action="store_true", help="print JSON with the claims")
    gone = verbs.add_parser("revoke", help="make tokens void at once")
    gone.add_argument("kind", choices=("run", "agent", "key"), help="what to revoke")
    gone.add_argument("id", metavar="ID", help="id of the run (or last), name of the agent, or kid of the key")
    gone.add_argument("--json", action="store_true", help="print JSON with the keys kind, revoked")
    turn = verbs.add_parser("rotate", help="give an agent a new key; the old one is published while tokens are out")
    which = turn.add_mutually_exclusive_group(required=True)
    which.add_argument("agent", nargs="?", metavar="AGENT", help="the agent")
    which.add_argument("--all", action="store_true", help="every agent that has a key")
    turn.add_argument("--json", action="store_true", help="print JSON with the key rotated")
    master = verbs.add_parser("rotate-master", help="encrypt all keys under a new master key")
    master.add_argument("--new-key", default="", metavar="FILE", help="file (0600) with the new key; else generated")
    master.add_argument("--json", action="store_true", help="print JSON with the key master_key")
    names = verbs.add_parser("configure", help="set trust domain or issuer; tokens that are out become void")
    names.add_argument("--trust-domain", default="", metavar="NAME", help="the first part of every SPIFFE ID")
    names.add_argument("--issuer", default="", metavar="URL", help="`iss` of tokens: an https URL you publish keys at")
    serve = verbs.add_parser("serve", help="serve tokens and public keys on 127.0.0.1:2082 and a Unix socket")
    serve.add_argument("--port", default="2082", help="another port (2082)")
    serve.add_argument("--admin-token", default="", metavar="FILE", help="file with the token of TCP callers")
    return verb


class _Action(Parser):
    """The parser of one action: argparse names it by its `prog`."""

    def __init__(self, **settings: str) -> None:
        """Take what `add_parser` knows."""
        super().__init__(settings["prog"].removeprefix("cloister "), "")


def main(argv: list[str]) -> int:
    """Do one action.

    Raises:
        CloisterError: the key store cannot be opened, or the token proves nothing.
    """
    options = parser().read(argv)
    if options.action == "serve":
        from cloister.services.identity import main as serve

        admin = ["--admin-token", options.admin_token] if options.admin_token else []
        return serve(["--port", options.port, *admin])
    store = IdentityStore(f"{records.places().state}/{DIRECTORY}", os.environ, hostname=socket.gethostname())
    match options.action:
        case "show":
            _show(store, as_json=options.json)
        case "jwks":
            output.print_json(store.jwks())
        case "verify":
            _verify(store, options)
        case "revoke":
            name = _meant(store, options.kind, options.id)
            revoke(store, options.kind, name)
            _say(f"revoked {options.kind} {name}", {"kind": options.kind, "revoked": name}, options.json)
        case "rotate":
            done = store.rotate("" if options.all else options.agent)
            _say(f"new keys: {', '.join(done) or 'none'}", {"rotated": done}, options.json)
        case "rotate-master":
            where = store.rotate_master(_new_key(options.new_key))
            _say(f"all keys are encrypted anew; the master key is in {where}", {"master_key": where}, options.json)
        case _:
            _configure(store, options.trust_domain, options.issuer)
    return 0


def _show(store: IdentityStore, *, as_json: bool) -> None:
    state, now, source = store.read(), time.time(), store.source
    keys = [
        {"agent": key.agent, "kid": key.kid, "created": key.created, "retired": key.retired or None}
        for key in state.keys
    ]
    if as_json:
        output.print_json(
            {
                "trust_domain": state.trust_domain, "issuer": state.issuer, "keys": keys, "revoked": state.revoked,
                "master_key": {"from": source.what, "path": source.path},
            }
        )  # fmt: skip
        return
    print(output.pairs([("trust domain", state.trust_domain), ("issuer", state.issuer),
                        ("master key", source.what + (f" ({source.path})" if source.path else ""))]))  # fmt: skip
    rows = [
        [key.agent, key.kid, output.ago(key.created, now), "signs" if key.signs else "retired, still published"]
        for key in state.keys
    ]
    print("\n" + output.table(["AGENT", "KID", "MADE", "STATE"], rows) if rows else "\nno keys yet")
    gone = [[one.kind, one.id, output.ago(one.at, now)] for one in state.revoked if one.kind != "token"]
    if gone:
        print("\n" + output.table(["REVOKED", "ID", "WHEN"], gone))


def _verify(store: IdentityStore, options: object) -> None:
    from cloister.identity.authority import Demand

    token, audience = getattr(options, "token", ""), getattr(options, "audience", "")
    if token == "-":  # noqa: S105  # a word of the command line
        token = sys.stdin.read(_MAX_TOKEN)
    demand = Demand(
        audience=audience,
        run=getattr(options, "run", ""),
        agent=getattr(options, "agent", ""),
        digest=getattr(options, "require_digest", ""),
    )
    try:
        claims = msgspec.structs.asdict(store.verify(token.strip(), demand))
    except TokenError as error:
        if error.reference == "token-malformed":
            error.remedy = "cloister identity verify - < FILE, with a FILE of $CLOISTER_IDENTITY_DIRECTORY"
        raise
    if getattr(options, "json", False):
        output.print_json(claims)
        return
    print(output.pairs([(name, str(value)) for name, value in claims.items()]))


def _meant(store: IdentityStore, kind: str, name: str) -> str:
    """Return what is revoked: the run that an id begins, or the word itself, with a doubt where nothing bears it.

    It is revoked all the same: a token of the service's may name a run or an agent that has no record here.
    """
    if kind == "run":
        try:
            return records.store().find(name)
        except UsageError:
            known, remedy = False, "cloister ps --all"
    else:
        keys = store.read().keys
        known, remedy = any(name in (key.agent, key.kid) for key in keys), "cloister identity show"
    if not known:
        print(output.clean(f"cloister: no {kind} {name!r} is known here, see {remedy}"), file=sys.stderr)
    return name


def _new_key(path: str) -> str:
    if not path:
        return ""
    data = read_private(path)
    if data is None:
        raise UsageError(
            "master-key-missing", "there is no such file", where=path, remedy=f"openssl rand -hex 32 > {path}"
        )
    try:
        return data.decode("ascii")
    except UnicodeDecodeError:
        raise DeniedError("master-key-invalid", "a master key is 64 hexadecimal digits", where=path) from None


def _configure(store: IdentityStore, trust_domain: str, issuer: str) -> None:
    if not trust_domain and not issuer:
        raise UsageError(
            "usage", "nothing to set", remedy="cloister identity configure --issuer https://id.example.org"
        )
    state = store.configure(trust_domain=trust_domain, issuer=issuer)
    print(output.pairs([("trust domain", state.trust_domain), ("issuer", state.issuer)]))


def _say(text: str, value: object, as_json: bool) -> None:
    if as_json:
        output.print_json(value)
    else:
        print(output.clean(text))
