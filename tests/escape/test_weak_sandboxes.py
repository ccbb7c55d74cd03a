"""The battery can fail: against weak sandboxes its cases report that they got through."""

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from weak_grounds import Bare, Leaky, Plain

from cloister.policy.protected import effective_names
from cloister.prove import procedures
from cloister.prove.canaries import Canaries
from cloister.prove.case import load, parse
from cloister.prove.runner import Battery, Result

pytestmark = pytest.mark.kernel

WITHOUT_SANDBOX = (
    "fs-hardlink",
    "fs-home-canary",
    "fs-openat2",
    "fs-proc-aliases",
    "fs-protected-absent",
    "fs-protected-present",
    "fs-rename-parent",
    "fs-shared-directories",
    "fs-spellings",
    "fs-symlink-read",
    "fs-symlink-swap",
    "fs-symlink-write",
    "git-bare",
    "git-commondir",
    "git-config",
    "git-config-worktree",
    "git-hooks",
    "git-plain",
    "git-pointer",
    "git-worktrees",
    "ipc-abstract",
    "ipc-system-v",
    "ipc-unix-socket",
    "kernel-capabilities",
    "kernel-clock",
    "kernel-fanotify",
    "kernel-pidfd-getfd",
    "kernel-process-memory",
    "kernel-ptrace",
    "kernel-personality",
    "kernel-seccomp-listener",
    "kernel-userns-clone3",
    "persist-home",
    "policy-project-file",
    "proc-core-dumps",
    "proc-environment",
    "proc-host-pids",
    "proc-identity-leaks",
    "proc-inherited-descriptors",
)
PLAIN_BUBBLEWRAP = (
    "fs-home-canary",
    "fs-symlink-read",
    "git-hooks",
    "git-config",
    "ipc-unix-socket",
    "kernel-process-memory",
    "kernel-ptrace",
    "kernel-seccomp-listener",
    "kernel-userns-clone3",
    "proc-environment",
)
SAFE_IN_BUBBLEWRAP = ("proc-host-pids", "net-interfaces")


def facts(base: Path) -> dict[str, Any]:
    """Return what cases know about the host, made up."""
    names = effective_names((), ())
    return {
        "protected": [[entry.name, entry.kind] for entry in names if entry.when == "always"],
        "protected_present": [[entry.name, entry.kind] for entry in names],
        "host_addresses": [],
        "host_homes": [],
        "host_name": os.uname().nodename,
        "host_machine_id": "",
        "pass_environment": [],
        "given_variables": [],
        "overlay": False,
        "policy": f"{base}/policy.toml",
        "cloister_paths": [],
    }


def attack(ground: Bare, base: Path, names: tuple[str, ...]) -> dict[str, Result]:
    """Run cases in a weak sandbox; return results by id."""
    cases = load()
    with Canaries(str(base), str(base)) as canaries:
        results = Battery(ground, canaries, frozenset(), facts(base)).run([cases[name] for name in names])
    return {result.case.id: result for result in results}


def test_without_a_sandbox_attacks_get_through(ground_base: Path) -> None:
    """Unconfined, each of these cases says *allowed*, none passes."""
    results = attack(Bare(ground_base), ground_base, WITHOUT_SANDBOX)

    assert {name: result.outcome for name, result in results.items() if result.outcome != "allowed"} == {}


def test_plain_bubblewrap_is_told_from_cloister(ground_base: Path) -> None:
    """Bubblewrap without filter and allowlist: some attacks get through, what namespaces stop is denied."""
    results = attack(Plain(ground_base), ground_base, PLAIN_BUBBLEWRAP + SAFE_IN_BUBBLEWRAP)

    assert {name: results[name].detail for name in PLAIN_BUBBLEWRAP if results[name].outcome != "allowed"} == {}
    assert {name: results[name].detail for name in SAFE_IN_BUBBLEWRAP if results[name].outcome != "denied"} == {}


def test_a_run_that_outlives_its_broker_is_found_out(ground_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on after the broker was killed is reported."""
    monkeypatch.setattr(procedures, "DEATH_S", 0.5)
    results = attack(Bare(ground_base), ground_base, ("open-kill-broker",))

    assert results["open-kill-broker"].outcome == "allowed"


def test_what_is_typed_into_the_callers_terminal_is_found_out(ground_base: Path) -> None:
    """A case that types into the terminal and keeps silent is found out by the host, where the kernel lets it type."""
    try:
        allowed = Path("/proc/sys/dev/tty/legacy_tiocsti").read_text(encoding="ascii").strip() != "0"
    except FileNotFoundError:
        allowed = True  # kernels before 6.2
    types = "import fcntl, contextlib\n    with contextlib.suppress(OSError):\n        fcntl.ioctl(0, 0x5412, b'i')"
    case = parse(f'{HEADER}PROCEDURE = "terminal"\ndef attack(box):\n    {types}\n    box.stopped("")\n', "x.py")
    with Canaries(str(ground_base), str(ground_base)) as canaries:
        (result,) = Battery(Bare(ground_base), canaries, frozenset(), facts(ground_base)).run([case])

    assert result.outcome == ("allowed" if allowed else "denied"), result.detail


HEADER = 'ID = "x"\nTITLE = "x"\nPROMISE = "P-001"\nCLASSES = (1,)\nEXPECT = "x"\n'
SHAPES = {
    "reads a canary and keeps silent": ("    print(open(box.fact('secret')).read()); box.stopped('')", "allowed"),
    "writes a canary and keeps silent": ("    open(box.fact('writable'), 'a').write('x'); box.stopped('')", "allowed"),
    "ends the host's process": ("    import os; os.kill(box.fact('host_pid'), 9); box.stopped('')", "allowed"),
    "tries nothing": ("    pass", "error"),
    "fails in an unforeseen way": ("    1 / 0", "error"),
    "meets an unforeseen error": ("    box.refused('x', 'EROFS', open, '/nonexistent')", "error"),
    "dies": ("    import os; os._exit(0)", "error"),
    "hangs": ("    import time; time.sleep(60)", "error"),
    "cannot run": (
        "    from cloister.prove.inside import support\n    raise support.CannotRunError('no')",
        "cannot-run",
    ),
    "breaks its twin": ("    box.stopped('x')\ndef twin(box):\n    box.works('it', False)", "error"),
    "is honest": ("    box.stopped('x')\ndef twin(box):\n    pass", "denied"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_only_an_honest_denial_passes(shape: str, ground_base: Path) -> None:
    """Whatever a case says, the host's canaries decide; and a case that proves nothing does not pass."""
    body, expected = SHAPES[shape]
    case = parse(f"{HEADER}LIMIT_S = 1.0\ndef attack(box):\n{body}\n", "x.py")
    with Canaries(str(ground_base), str(ground_base)) as canaries:
        (result,) = Battery(Bare(ground_base), canaries, frozenset(), facts(ground_base)).run([case])

    assert result.outcome == expected, result.detail


def test_an_opt_out_is_not_a_pass(ground_base: Path) -> None:
    """A case that the policy allows by name is not tried, and says so."""
    case = load()["kernel-mount"]
    with Canaries(str(ground_base), str(ground_base)) as canaries:
        battery = Battery(Bare(ground_base), canaries, frozenset({"hardening.nested"}), facts(ground_base))
        (result,) = battery.run([case])

    assert (result.outcome, result.detail) == ("opted-out", "opted out by policy: hardening.nested")


# --- what issues secrets: each of its cases can fail -------------------------------------------------

HOST, OTHER = "bound.example.org", "other.example.org"
NAMES = (HOST, OTHER, "cloister-prove.example", "api.cloister-prove.example", "localhost", "cloister.internal", "com")
REAL, TOKEN = "made-up-Real-Secret-1234567890", "cloister-one-abcdefghijklmnopabcdefghijklmnop"
LEAKY = (
    *(name for name, case in load().items() if case.if_policy and not {"unit", "microvm"} & {*case.if_policy}),
    "fs-secret-stores",
    "ipc-gpg-agent",
    "ipc-key-agent",
)


def leaky_facts(base: Path) -> dict[str, Any]:
    """Return what a policy with everything would tell cases."""
    credentials = [
        {"name": "one", "variables": ["TOKEN"], "scheme": "bearer", "places": [[HOST, 443]]},
        {"name": "two", "variables": ["REAL"], "scheme": "bearer", "places": [[OTHER, 443]]},
    ]
    return facts(base) | {
        "credentials": credentials,
        "token_places": [[HOST, 443, "/token"]],
        "providers": [["anthropic", "127.0.0.1", 11435]],
        "models": ["claude-*"],
        "model_key": "MODEL_KEY",
        "plain_hosts": [],
        "secret_stores": [f"{base}/ledger.db", f"{base}/logins"],
        "identity_sockets": [f"{base}/agent.sock"],
        "broker_socket": f"{base}/broker.sock",
        "unread_secrets": [],
        "tops": [str(base)],
    }


@pytest.fixture(params=["200 OK", "404 Not Found"])
def leaky(request: pytest.FixtureRequest, ground_base: Path) -> Leaky:
    """A weak sandbox with a real secret, another run's token, a ledger and a record with a secret in them.

    What a server behind the proxy answers does not matter, that it answers does.
    """
    ground = Leaky(ground_base, NAMES, request.param)
    (ground_base / "ledger.db").write_text("-----BEGIN PRIVATE KEY-----", encoding="ascii")
    (ground_base / "logins").mkdir()
    (ground_base / "identity").mkdir()
    claims = base64.urlsafe_b64encode(json.dumps({"run": "another", "agent": "x"}).encode()).decode().rstrip("=")
    (ground_base / "identity/cloister.jwt").write_text(f"eyJhbGciOiJFZERTQSJ9.{claims}.{'A' * 86}", encoding="ascii")
    (ground_base / ".gnupg").mkdir()
    (ground_base / ".gnupg/S.gpg-agent").write_text(f"%Assuan%\nsocket={ground_base}/gpg.sock\n", encoding="utf-8")
    (ground_base / "state/cloister/runs/one").mkdir(parents=True)
    (ground_base / "state/cloister/runs/one/events.jsonl").write_text(f'{{"header": "{REAL}"}}\n', encoding="utf-8")
    ground.more = {
        "TOKEN": TOKEN, "REAL": REAL, "MODEL_KEY": f"{TOKEN}-model", "CLOISTER_RUN": "mine", "CLOISTER_AGENT": "x",
        "CLOISTER_IDENTITY_DIRECTORY": f"{ground_base}/identity",
        "CLOISTER_IDENTITY_TOKEN_FILE": f"{ground_base}/identity/cloister.jwt",
    }  # fmt: skip
    return ground


def test_each_case_about_secrets_can_fail(leaky: Leaky, ground_base: Path) -> None:
    """Where secrets are inside and a proxy carries everything, each of these cases says *allowed*, none passes."""
    cases = load()
    with Canaries(str(ground_base), str(ground_base)) as canaries:
        canaries.known.add("the real one", REAL.encode())
        battery = Battery(leaky, canaries, frozenset(), leaky_facts(ground_base))
        results = {result.case.id: result for result in battery.run([cases[name] for name in LEAKY])}

    assert {name: (one.outcome, one.detail) for name, one in results.items() if one.outcome != "allowed"} == {}
    assert "real secret read: the real one" in results["cred-inside"].detail
    assert "real secret read: the real one" in results["cred-records"].detail
    assert REAL not in "".join(result.detail for result in results.values())


def test_what_a_policy_does_not_have_is_not_attacked(ground_base: Path) -> None:
    """A case that needs a thing of the policy is left out where there is none, and is no pass either."""
    cases = load()
    with Canaries(str(ground_base), str(ground_base)) as canaries:
        battery = Battery(Bare(ground_base), canaries, frozenset(), facts(ground_base), held=frozenset({"keys"}))
        (result,) = battery.run([cases["llm-keys"]])

    assert (result.outcome, result.detail) == ("not-in-policy", "the policy gives this agent no models")


@pytest.mark.parametrize("write", [str, lambda text: text[::-1], lambda text: base64.b64encode(text.encode()).decode()])
def test_a_real_secret_in_an_answer_is_a_breach(write: Callable[[str], str], ground_base: Path) -> None:
    """A case that prints a secret and says *denied* is not believed, however the secret is written."""
    case = parse(f"{HEADER}def attack(box):\n    print({write(REAL)!r}); box.stopped('x')\n", "x.py")
    with Canaries(str(ground_base), str(ground_base)) as canaries:
        canaries.known.add("the real one", REAL.encode())
        (result,) = Battery(Bare(ground_base), canaries, frozenset(), facts(ground_base)).run([case])

    assert (result.outcome, result.detail) == ("allowed", "real secret read: the real one")
    assert REAL not in repr(canaries.known)


def test_a_report_of_a_breach_shows_no_secret(ground_base: Path) -> None:
    """A case that reads a secret and says so is a breach, and stars stand in its words."""
    case = parse(f"{HEADER}def attack(box):\n    box.breach('found {REAL} here')\n", "x.py")
    with Canaries(str(ground_base), str(ground_base)) as canaries:
        canaries.known.add("the real one", REAL.encode())
        (result,) = Battery(Bare(ground_base), canaries, frozenset(), facts(ground_base)).run([case])

    assert (result.outcome, result.detail) == ("allowed", "real secret read: the real one; found ******** here")
