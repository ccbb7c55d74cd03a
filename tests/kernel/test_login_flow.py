"""`cloister login` and `cloister logout` as a person uses them, against a provider that keeps its rules."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

from cloister.credentials import products
from cloister.errors import DeniedError, RetryError
from cloister.host.browser import open_browser
from cloister.host.redirects import Redirects
from cloister.policy.login import Login
from cloister.runs.login_flow import Person, by_browser, by_device, by_paste
from cloister.runs.login_renewal import poster
from support.fake_oauth import CLIENT, EMAIL, Answer, FakeOauth

pytestmark = pytest.mark.kernel
SOURCE = Path(products.__file__).parents[2]


class Conversation:
    """What is told to the person; an answer to it can be started in another thread."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.address = ""

    def tell(self, text: str) -> None:
        """Keep the text, and the address in it."""
        self.texts.append(text)
        self.address = next((word for word in text.split() if "authorize?" in word), self.address)


@pytest.fixture
def provider() -> Iterator[FakeOauth]:
    """A provider."""
    with FakeOauth(interval_s=0.05) as provider:
        yield provider


def get(address: str, **headers: str) -> tuple[int, str]:
    """Ask as a browser does; return the status and the text."""
    parts = urlsplit(address)
    connection = http.client.HTTPConnection("127.0.0.1", parts.port or 80, timeout=5)
    connection.request("GET", f"{parts.path}?{parts.query}", headers=headers)
    response = connection.getresponse()
    location = response.getheader("Location") or ""
    return response.status, location or response.read().decode()


def log_in(provider: FakeOauth, visit, login: Login | None = None, terminal: int = -1):
    """Run a login by browser, with a thread that does what `visit` does with the authorize address."""
    said = Conversation()
    threads: list[threading.Thread] = []

    def opened(start: str) -> bool:
        thread = threading.Thread(target=visit, args=(said.address, start), daemon=True)
        threads.append(thread)
        thread.start()
        return True

    person = Person(said.tell, opened, terminal)
    try:
        return by_browser(login or provider.login(), person, poster({}))
    finally:
        for thread in threads:
            thread.join(10)


def test_the_whole_flow(provider: FakeOauth) -> None:
    """Code, state and verifier go where they belong; the browser is told, and the start address works once."""
    seen: list[tuple[int, str]] = []

    def visit(address: str, start: str) -> None:
        seen.append(get(start))
        seen.append(get(start))
        seen.append(get(provider.agree(address)))

    granted = log_in(provider, visit)

    assert provider.is_good(granted.access_token)
    assert granted.account == EMAIL
    assert seen[0][0] == 302
    assert seen[0][1].startswith(f"{provider.url}/authorize?")
    assert seen[1][0] == 404
    assert seen[2][0] == 200
    assert "logged in" in seen[2][1]


def test_attacks_on_the_redirect_neither_help_nor_end_the_login(provider: FakeOauth) -> None:
    """Wrong state, a stolen code, another host's name, other paths and methods, silence, garbage: the login goes on."""
    answers: list[int] = []

    def visit(address: str, _start: str) -> None:
        right = provider.agree(address)
        other = urlsplit(right)
        base = f"http://127.0.0.1:{other.port}"
        state = parse_qs(other.query)["state"][0]
        silent = [socket.create_connection(("127.0.0.1", other.port or 0)) for _ in range(8)]
        silent[0].sendall(b"\x16\x03\x01 garbage\r\n\r\n")
        silent[1].sendall(b"GET /" + b"a" * 40_000)
        answers.append(get(f"{base}/callback?{urlencode({'code': 'stolen', 'state': 'x' * 43})}")[0])
        answers.append(get(f"{base}/callback?code=stolen")[0])
        answers.append(get(f"{base}/callback?error=access_denied")[0])
        answers.append(get(f"{base}/elsewhere?code=a&state={state}")[0])
        answers.append(get(right, Host="evil.example")[0])
        answers.append(get(right, Host=f"evil.example:{other.port}")[0])
        for sock in silent:
            sock.close()
        answers.append(get(right)[0])

    granted = log_in(provider, visit)

    assert answers == [400, 400, 400, 404, 400, 400, 200]
    assert provider.is_good(granted.access_token)
    assert [fields["code"] for path, fields in provider.requests if path == "/token"] != ["stolen"]


def test_a_code_of_another_attempt_is_worth_nothing(provider: FakeOauth) -> None:
    """Code injection: with our state and somebody else's code the exchange fails, for the verifier is ours."""

    def visit(address: str, _start: str) -> None:
        asked = {name: values[0] for name, values in parse_qs(urlsplit(address).query).items()}
        theirs = provider.agree(
            f"{provider.url}/authorize?"
            + urlencode(asked | {"code_challenge": "A" * 43, "state": "theirs", "client_id": CLIENT})
        )
        code = parse_qs(urlsplit(theirs).query)["code"][0]
        get(f"{asked['redirect_uri']}?{urlencode({'code': code, 'state': asked['state']})}")

    with pytest.raises(DeniedError) as caught:
        log_in(provider, visit)

    assert "invalid_grant" in caught.value.message
    assert not provider.families


def test_no_is_an_answer(provider: FakeOauth) -> None:
    """A refusal with the right state ends the login at once, and the browser is told."""

    def visit(address: str, _start: str) -> None:
        asked = {name: values[0] for name, values in parse_qs(urlsplit(address).query).items()}
        get(f"{asked['redirect_uri']}?{urlencode({'error': 'access_denied', 'state': asked['state']})}")

    with pytest.raises(DeniedError, match="access_denied"):
        log_in(provider, visit)


def test_a_fixed_port_has_a_second_choice(provider: FakeOauth) -> None:
    """Where the provider knows two ports, the second is used when the first is taken; then there is an error."""
    with socket.create_server(("127.0.0.1", 0)) as first, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
        probe.close()
        taken = f"http://localhost:{first.getsockname()[1]}/cb"
        with Redirects((taken, f"http://localhost:{free}/cb")) as redirects:
            assert redirects.redirect_uri == f"http://localhost:{free}/cb"
        with pytest.raises(RetryError, match="taken"):
            Redirects((taken,))


def test_the_last_address_can_be_pasted(provider: FakeOauth) -> None:
    """With the browser on another machine: a wrong line is told, the right one logs in."""
    ours, theirs = pty.openpty()

    def visit(address: str, _start: str) -> None:
        os.write(ours, b"nonsense\n")
        time.sleep(0.2)
        os.write(ours, provider.agree(address).encode() + b"\n")

    granted = log_in(provider, visit, terminal=theirs)

    assert provider.is_good(granted.access_token)
    os.close(ours)
    os.close(theirs)


def test_a_shown_code_can_be_pasted(provider: FakeOauth) -> None:
    """The provider's own page shows `CODE#STATE`; one of another login is not taken."""
    said = Conversation()
    page = f"{provider.url}/shown"

    def lines() -> Iterator[str]:
        yield "code#of-another-login\n"
        query = parse_qs(urlsplit(provider.agree(said.address)).query)
        yield f"{query['code'][0]}#{query['state'][0]}\n"

    read = lines()
    granted = by_paste(
        provider.login(paste_redirect=page, exchange="json", state_in_exchange=True),
        Person(said.tell, lambda _: False),
        lambda: next(read, ""),
        poster({}),
    )

    assert provider.is_good(granted.access_token)
    assert provider.requests[-1][1]["redirect_uri"] == page
    with pytest.raises(RetryError):
        by_paste(provider.login(paste_redirect=page), Person(said.tell, lambda _: False), lambda: "", poster({}))


@pytest.mark.parametrize(("outcome", "error"), [("agreed", None), ("denied", DeniedError)])
def test_a_device_code(provider: FakeOauth, outcome: str, error: type[Exception] | None) -> None:
    """The code is shown, asking is slowed down when told to, and the person's word counts."""
    said = Conversation()
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        time.sleep(min(seconds, 0.06))
        if len(waits) == 3:
            provider.agree_device("WDJB-0000", outcome)

    with contextlib.nullcontext() if error is None else pytest.raises(error):
        granted = by_device(provider.login(), Person(said.tell, lambda _: False), poster({}), sleep=sleep)
        assert provider.is_good(granted.access_token)

    assert "WDJB-0000" in said.texts[0]
    assert 3 <= len(waits) <= 4


def test_a_device_that_asks_too_often_is_slowed_down(provider: FakeOauth) -> None:
    """RFC 8628 section 3.5: five seconds more each time; trouble in between is waited out."""
    waits: list[float] = []
    provider.trouble = [
        Answer(400, b'{"error": "slow_down"}'),
        Answer(503, b""),
        Answer(400, b'{"error": "slow_down"}'),
    ]

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        time.sleep(0.06)
        provider.agree_device("WDJB-0000")

    by_device(provider.login(), Person(lambda _: None, lambda _: False), poster({}), sleep=sleep)

    assert [round(wait - waits[0]) for wait in waits] == [0, 5, 5, 10]


def test_no_browser_is_opened_for_root_or_without_a_desktop(tmp_path: Path) -> None:
    """An ordinary user with a desktop gets one; the twin shows that the test could tell."""
    program = tmp_path / "xdg-open"
    program.write_text('#!/bin/sh\necho "$1" > "${0%/*}/opened"\n')
    program.chmod(0o755)
    desktop = {"PATH": f"{tmp_path}:/usr/bin:/bin", "DISPLAY": ":0"}

    assert not open_browser("http://127.0.0.1:1/", desktop, 0)
    assert not open_browser("http://127.0.0.1:1/", {"PATH": desktop["PATH"]}, 1000)
    assert not (tmp_path / "opened").exists()
    assert open_browser("http://127.0.0.1:1/", desktop, 1000)
    assert (tmp_path / "opened").read_text() == "http://127.0.0.1:1/\n"


class Cli:
    """The command line of a user whose own preset `test` is the fake provider."""

    def __init__(self, home: Path, provider: FakeOauth) -> None:
        self.home = home
        self.logins = home / ".local/state/cloister/logins"
        login = provider.login()
        folder = home / ".config/cloister/presets"
        folder.mkdir(parents=True)
        keys = ("authorize_url", "token_url", "device_url", "revoke_url", "client_id")
        text = "".join(f'{key} = "{getattr(login, key)}"\n' for key in keys)
        (folder / "test.toml").write_text(f'schema = 1\n[login]\n{text}hosts = ["api.example.org"]\n')
        self.environment = {"HOME": str(home), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(SOURCE)}

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start a verb."""
        command = [sys.executable, "-m", "cloister", *words]
        return subprocess.Popen(
            command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str) -> tuple[int, str, str]:
        """Run a verb to its end."""
        process = self.start(*words)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def log_in(self, provider: FakeOauth, *words: str) -> tuple[int, str, str]:
        """Log in, and agree in a browser."""
        process = self.start("login", "test", "--no-browser", *words)
        get(provider.agree(self.address(process)))
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    @staticmethod
    def address(process: subprocess.Popen[str]) -> str:
        """Return the address that is shown."""
        assert process.stderr
        return next(word for line in process.stderr for word in line.split() if "authorize?" in word)


@pytest.fixture
def cli(tmp_path: Path, provider: FakeOauth) -> Cli:
    """A user."""
    return Cli(tmp_path / "home", provider)


def tokens_of(provider: FakeOauth) -> set[str]:
    """Return every token the provider has given out."""
    return {token for family in provider.families for token in (*family.access, family.refresh)}


def test_login_list_and_logout(cli: Cli, provider: FakeOauth) -> None:
    """The life of a login at the command line; no token in anything that is printed; revoked at the end."""
    code, out, err = cli.log_in(provider)
    assert code == 0, err
    assert 'login:test"' in out

    code, listed, _ = cli.run("login", "--list")
    as_json = json.loads(cli.run("login", "--list", "--json")[1])
    broken = cli.run("login", "nonsense")
    code, gone, _ = cli.run("logout", "test", "--json")

    assert EMAIL in listed
    assert as_json[0]["name"] == "test"
    assert as_json[0]["state"] == "good"
    assert broken[0] == 64
    assert "claude" in broken[2]
    assert json.loads(gone) == [{"name": "test", "outcome": "revoked"}]
    assert provider.families[0].ended
    assert not (cli.logins / "test.json").exists()
    assert tokens_of(provider)
    printed = out + err + listed + json.dumps(as_json) + gone
    assert not [token for token in tokens_of(provider) if token in printed]
    assert cli.run("logout", "test")[0] == 64


def test_ctrl_c_leaves_nothing(cli: Cli) -> None:
    """Broken off while the browser is waited for: exit code 130, and no file."""
    process = cli.start("login", "test", "--no-browser")
    assert cli.address(process)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)

    assert process.returncode == 130
    assert not cli.logins.exists()


def test_no_secret_is_in_the_arguments_of_any_process(cli: Cli, provider: FakeOauth) -> None:
    """While a login waits, neither its own command line nor that of a child holds the state or the challenge."""
    process = cli.start("login", "test", "--no-browser")
    state = parse_qs(urlsplit(cli.address(process)).query)["state"][0]
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(path.read_bytes())
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)

    assert lines
    assert not [line for line in lines if state.encode() in line]


def test_a_provider_that_is_gone_stays_in_the_list_and_goes_at_logout(cli: Cli, provider: FakeOauth) -> None:
    """Revocation that fails is told; the file goes all the same. A broken file is listed as such, and goes, too."""
    cli.log_in(provider)
    path = cli.logins / "test.json"
    path.write_bytes(path.read_bytes().replace(provider.url.encode(), b"http://127.0.0.1:9"))

    code, out, err = cli.run("logout", "test")
    assert (code, out) == (0, "test: forgotten\n")
    assert "not confirmed" in err

    path.write_bytes(b"{")
    path.chmod(0o600)
    assert json.loads(cli.run("login", "--list", "--json")[1]) == [{"name": "test", "state": "login-unreadable"}]
    assert cli.run("logout", "test")[1] == "test: forgotten\n"
    assert not path.exists()


CLAUDE_FILE = {
    "claudeAiOauth": {
        "accessToken": "sk-ant-oat01-made-up",
        "refreshToken": "sk-ant-ort01-made-up",
        "expiresAt": 4102444800000,
        "scopes": ["user:inference", "user:profile"],
        "subscriptionType": "max",
    }
}


def test_a_login_can_be_taken_over_from_the_product(cli: Cli) -> None:
    """The person is told what becomes of the copy; the product's file is not touched, no token is printed."""
    path = cli.home / ".claude/.credentials.json"
    assert cli.run("login", "claude", "--from-product")[0] == 64
    path.parent.mkdir()
    path.write_text(json.dumps(CLAUDE_FILE))
    path.chmod(0o600)

    code, out, err = cli.run("login", "claude", "--from-product", "--json")

    assert code == 0, err
    assert json.loads(out)[0]["scopes"] == ["user:inference", "user:profile"]
    assert "stops working" in err
    assert "made-up" not in out + err
    assert json.loads(path.read_text()) == CLAUDE_FILE
    kept = json.loads((cli.logins / "claude.json").read_text())
    assert kept["refresh_token"] == "sk-ant-ort01-made-up"
    assert kept["details"] == {"subscriptionType": "max"}


def test_a_product_that_is_not_logged_in_has_nothing_to_hand_over(cli: Cli) -> None:
    """Only a key, an empty login, garbage: each is told, and nothing is stored."""
    path = cli.home / ".codex/auth.json"
    path.parent.mkdir()
    for content in (
        '{"OPENAI_API_KEY": "sk-made-up"}',
        '{"tokens": {}}',
        "garbage",
        '{"tokens": {"access_token": "a b"}}',
    ):
        path.write_text(content)
        code, _, err = cli.run("login", "codex", "--from-product")
        assert code == 64
        assert "login-no-product" in err
        assert "made-up" not in err
    assert not cli.logins.exists()


def test_check_says_what_a_login_lacks(cli: Cli, provider: FakeOauth) -> None:
    """Not made, for other hosts, or ended: each is a warning with what to type; the twin is silent."""
    policy = cli.home / ".config/cloister/cloister.toml"

    def warned(host: str = "api.example.org") -> str:
        inject = f'inject = {{ host = "{host}", scheme = "bearer" }}'
        policy.write_text(
            'schema = 1\n[agents.a]\npreset = "shell"\n'
            f'[agents.a.egress]\nallow = ["{host}"]\n'
            f'[agents.a.credentials.x]\nsecret = "login:test"\n{inject}\n'
        )
        policy.chmod(0o600)
        return str(json.loads(cli.run("check", "--json")[1])["warnings"])

    assert "no login 'test'" in warned()
    cli.log_in(provider)
    assert warned() == "[]"
    assert "not for other.example.org" in warned("other.example.org")
    path = cli.logins / "test.json"
    path.write_bytes(path.read_bytes().replace(b'"made":', b'"ended": "invalid_grant", "made":'))
    assert "has ended" in warned()
