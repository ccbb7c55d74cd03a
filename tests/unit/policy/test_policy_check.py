"""Meaning of a policy: each mistake is found, and the right spelling beside it is not one."""

from __future__ import annotations

import pytest

from cloister.errors import PolicyError
from cloister.policy.load import load, load_preset, load_project

KEY = "sk-ant-api03-" + "x" * 30
AGENT = 'schema = 1\n[agents.a]\npreset = "shell"\n'


def messages(text):
    """Return the messages of a policy, an empty list when it loads."""
    try:
        load(text, "p.toml")
    except PolicyError as error:
        return [f"{problem.where} {problem.message}" for problem in error.problems]
    return []


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ("environment.LD_PRELOAD = '/x.so'", "environment.LDFLAGS = '-L/x'"),
        ("environment.GCONV_PATH = '/x'", "environment.GCONV = '/x'"),
        ("environment.BASH_ENV = '/x'", "environment.BASH = '/x'"),
        ("environment.'A-B' = '1'", "environment.A_B = '1'"),
        ("environment.HOME = '/x'", "environment.HOMEPAGE = '/x'"),
        ("environment.https_proxy = 'http://x'", "environment.HTTPS = 'x'"),
        (f"environment.K = '{KEY}'", "environment.K = 'sk-learn'"),
        ("environment.K = 'ghp_0123456789abcdefghijklmnopqrstuvwxyz'", "environment.K = 'ghp'"),
        ("environment.K = 'AKIAIOSFODNN7EXAMPLE'", "environment.K = 'AKIA'"),
        ("pass_environment = ['LD_LIBRARY_PATH']", "pass_environment = ['ANTHROPIC_API_KEY']"),
        (f"command = ['x', '--key={KEY}']", "command = ['x', '--key-file=/k']"),
        ("carry = ['/etc/passwd']", "carry = ['~/.gitconfig']"),
        ("carry = ['~']", "carry = ['.config/git']"),
        ("carry = ['~/../bob']", "carry = ['~/..bob']"),
        ("workspace.roots = ['/']", "workspace.roots = ['/srv/work']"),
        ("workspace.roots = ['~']", "workspace.roots = ['~/src']"),
        ("workspace.roots = ['~/']", "workspace.roots = ['~/src/']"),
        ("workspace.roots = ['/home']", "workspace.roots = ['/home/ann/src']"),
        ("workspace.roots = ['~bob/src']", "workspace.roots = ['src']"),
        ('workspace.roots = ["/a\\nb"]', 'workspace.roots = ["/a b"]'),
        ("workspace.roots = ['']", "workspace.roots = ['/a']"),
        ("workspace.protect = ['/etc']", "workspace.protect = ['ci/deploy']"),
        ("workspace.protect = ['.']", "workspace.protect = ['.x']"),
        ("filesystem.read = ['/proc/1']", "filesystem.read = ['/process']"),
        ("filesystem.read = ['/run/user/1000']", "filesystem.read = ['/run/opengl-driver']"),
        ("filesystem.read = ['/var/lib/x/docker.sock']", "filesystem.read = ['/var/lib/x/docker']"),
        ("filesystem.read = ['/srv/*.pem']", "filesystem.read = ['/srv/pem']"),
        ("filesystem.write = ['/etc/x']", "filesystem.read = ['/etc/x']"),
        ("filesystem.write = ['~/.config']", "filesystem.write = ['~/.config/nvim']"),
        ("filesystem.write = ['~/.config/cloister/presets']", "filesystem.write = ['~/.config/cloisters']"),
        ("filesystem.write = ['~/./.local//share/']", "filesystem.write = ['~/.local/share/pnpm']"),
        ("filesystem.read = ['~/.config']", "filesystem.read = ['~/.config/git']"),
        ("filesystem.read = ['/etc']", "filesystem.read = ['/etc/ssl']"),
        ("carry = ['.config/cloister/anthropic.key']", "carry = ['.config/nvim']"),
        ("carry = ['.local']", "carry = ['.local/bin']"),
        ("egress.allow = ['http://a.b']", "egress.allow = ['a.b']"),
        ("egress.allow = ['A.b']", "egress.allow = ['a.b:80']"),
        ("egress.allow = ['a.b.']", "egress.allow = ['a_b.c']"),
        ("egress.allow = ['a.b:0']", "egress.allow = ['a.b:1']"),
        ("egress.allow = ['a.b:65536']", "egress.allow = ['a.b:65535']"),
        ("egress.allow = ['*']", "egress.allow = ['*.a.b']"),
        ("egress.allow = ['*.com']", "egress.deny = ['*.com']"),
        ("egress.allow = ['a.*.b']", "egress.allow = ['a.x.b']"),
        ("egress.allow = ['127.1']", "egress.allow = ['203.0.113.1']"),
        ("egress.allow = ['2130706433']", "egress.allow = ['1e100.net']"),
        ("egress.allow = ['0x7f.1']", "egress.allow = ['0x7f.example.org']"),
        ("egress.allow = ['10.0.0.1/8']", "egress.allow = ['10.0.0.0/8']"),
        ("egress.allow = ['fe80::1%eth0']", "egress.allow = ['2001:db8::1']"),
        ("egress.allow = ['a@b.c']", "egress.allow = ['[2001:db8::1]:8443']"),
        ("egress.allow = ['münchen.de']", "egress.allow = ['xn--mnchen-3ya.de']"),
        ("egress.allow = ['cloister.internal:80']", "egress.allow = ['cloister.example']"),
        ("egress.allow = ['host.cloister.internal']", "egress.allow = ['host.cloister.internal:8080']"),
        ("egress.allow = [{host='a.b', methods=['get']}]", "egress.allow = [{host='a.b', methods=['GET']}]"),
        ("egress.allow = [{host='a.b', paths=['/a/../b']}]", "egress.allow = [{host='a.b', paths=['/a/**']}]"),
        ("egress.allow = [{host='a.b', paths=['/%2e']}]", "egress.allow = [{host='a.b', paths=['/*/b']}]"),
        ("egress.private = ['127.0.0.1']", "egress.private = ['192.168.1.10']"),
        ("egress.private = ['0.0.0.0/0']", "egress.private = ['10.1.0.0/16']"),
        ("egress.private = ['169.254.169.254/32']", "egress.private = ['fd00::/8']"),
        ("egress.upstream_proxy = 'socks5://a:1'", "egress.upstream_proxy = 'http://proxy.example.org:3128'"),
        ("egress.upstream_proxy = 'http://u:p@a:1'", "egress.upstream_proxy = 'env'"),
        (f"credentials.g.secret = '{KEY}'", "credentials.g.secret = 'file:~/.config/k'"),
        (f"credentials.g.secret = 'command:echo {KEY}'", "credentials.g.secret = 'command:gh auth token'"),
        ("credentials.g.secret = 'file:k'", "credentials.g.secret = 'file:/k'"),
        ("credentials.g.secret = 'env:A B'", "credentials.g.secret = 'env:A_B'"),
        ("credentials.g.secret = 'systemd:../x'", "credentials.g.secret = 'systemd:x.key'"),
        ("credentials.G.secret = 'env:A'", "credentials.g2.secret = 'env:A'"),
        (
            "credentials.g = {secret='env:A', inject={host='*.a.b', header='X'}}",
            "credentials.g = {secret='env:A', inject={host='a.b', header='X'}}",
        ),
        (
            "credentials.g = {secret='env:A', inject={host='a.b'}}",
            "credentials.g = {secret='env:A', inject={host='a.b', scheme='bearer'}}",
        ),
        (
            "credentials.g = {secret='env:A', inject={host='a.b', header='X Y'}}",
            "credentials.g = {secret='env:A', inject={host='a.b', header='X-Y'}}",
        ),
        (
            'credentials.g = {secret="env:A", inject={host="a.b", header="X", value="{secret}\\r\\nY: z"}}',
            'credentials.g = {secret="env:A", inject={host="a.b", header="X", value="token {secret}"}}',
        ),
        (
            "credentials.g = {secret='env:A', inject={host='a.b', header='X', value='fixed'}}",
            "credentials.g = {secret='env:A', inject={host='a.b', header='X', value='{secret}'}}",
        ),
        ("llm.providers = ['nobody']", "llm.providers = []"),
        ("credentials.g.secret = 'plain'", "credentials.g.secret = 'pass:plain'"),
        ('credentials.g.secret = "pass:a\\nb"', 'credentials.g.secret = "pass:a b"'),
        ("credentials.g.secret = 'pass: a'", "credentials.g.secret = 'pass:a'"),
        ("credentials.g = {secret='env:A', env='A-B'}", "credentials.g = {secret='env:A', env='A_B'}"),
        ("credentials.g = {secret='env:A', env='LD_PRELOAD'}", "credentials.g = {secret='env:A', env='LD'}"),
        (
            "credentials.g = {secret='env:A', inject={host='a b', header='X'}}",
            "credentials.g = {secret='env:A', inject={host='ab', header='X'}}",
        ),
        (
            f"credentials.g = {{secret='env:A', inject={{host='a.b', header='X', value='{{secret}} {KEY}'}}}}",
            "credentials.g = {secret='env:A', inject={host='a.b', header='X', value='{secret} k'}}",
        ),
        ("command = ['']", "command = ['x', '']"),
        ("workspace.unprotected = ['/x']", "workspace.unprotected = ['.vscode']"),
        ("filesystem.hide = ['/']", "filesystem.hide = ['~/src/private']"),
        ("agent_sandbox.deny_read = ['~']", "agent_sandbox.deny_read = ['~/.ssh']"),
        ("microvm.image = '../x'", "microvm.image = 'base'"),
        ("microvm.disk_rate = 'fast'", "microvm.disk_rate = '200M'"),
        (f"workspace.roots = ['/{'a' * 4096}']", f"workspace.roots = ['/{'a' * 200}']"),
        ("egress.deny = ['*']", "egress.deny = ['*.a.b', 'x.y:22']"),
        ("egress.allow = ['1.2.3.4.5']", "egress.allow = ['1.2.3.4']"),
        ("egress.allow = ['1.2.3.400']", "egress.allow = ['1.2.3.40']"),
        ("egress.allow = ['[2001:db8::1']", "egress.allow = ['2001:db8::/32']"),
        ("egress.allow = ['[2001:db8::1]443']", "egress.allow = ['[2001:db8::1]']"),
        (f"egress.allow = ['{'a.' * 127}b']", f"egress.allow = ['{'a.' * 126}b']"),
        ("egress.allow = ['']", "egress.allow = ['a']"),
        ("egress.allow = [{host='a.b', paths=['/a/**/b']}]", "egress.allow = [{host='a.b', paths=['/a/*/b']}]"),
        ("egress.allow = [{host='a.b', paths=['/a**']}]", "egress.allow = [{host='a.b', paths=['/**']}]"),
        ("limits.memory_max = '4'", "limits.memory_max = '4G'"),
        ("limits.cpu_quota = '1.5'", "limits.cpu_quota = '150%'"),
        ("limits.runtime_max = '8'", "limits.runtime_max = '8h'"),
        ("microvm.disk = '0G'", "microvm.disk = '8G'"),
    ],
)
def test_each_mistake_is_found_and_its_neighbour_is_none(bad, good):
    """A mistake of meaning is refused, and the nearest right spelling loads."""
    assert len(messages(f"{AGENT}{bad}\n")) == 1
    assert messages(f"{AGENT}{good}\n") == []


@pytest.mark.parametrize("name", ["A", "a_b", "-a", "9a", "a" * 33, "a/b", "a b", "..", "a%", "", "a\\n", "ä"])
def test_names_are_narrow(name):
    """Names become parts of paths and units, so nothing needs escaping in them."""
    assert messages(f'schema = 1\n[agents."{name}"]\ncommand = ["x"]\n')
    assert messages(f'schema = 1\n[profiles."{name}"]\n')


def test_good_names_are_names():
    """The twin: 32 characters, digits and dashes."""
    assert messages(f'schema = 1\n[agents.{"a" * 32}]\ncommand = ["x"]\n[agents.a-9]\ncommand = ["x"]\n') == []


def test_an_agent_runs_something():
    """Without a preset and without a command there is nothing to start; a profile needs neither."""
    assert messages("schema = 1\n[agents.a]\n") == ["p.toml:2 .agents.a neither preset nor command says what to run"]
    assert messages("schema = 1\n[profiles.a]\n") == []


def test_users_need_agents_and_roots():
    """P35 to P37: a user that may do nothing is a mistake, and agents must exist."""
    assert len(messages(AGENT + "[users.ann]\n")) == 2
    assert len(messages(AGENT + '[users.ann]\nagents = ["b"]\nroots = ["~/p"]\n')) == 1
    assert len(messages(AGENT + '[users.ann]\nagents = ["a"]\nroots = ["~"]\nconfig = "/etc"\n')) == 2
    assert len(messages(AGENT + '[users."a b"]\nagents = ["a"]\nroots = ["~/p"]\n')) == 1
    assert messages(AGENT + '[users.ann]\nagents = ["a"]\nroots = ["~/p", "p2"]\nconfig = ".pi/agent"\n') == []


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ("base_url = 'http://a.b/v1'", "base_url = 'https://a.b/v1'"),
        ("base_url = 'http://127.0.0.1.a.b'", "base_url = 'http://127.0.0.1:11434'"),
        ("base_url = 'https://u:p@a.b'", "base_url = 'https://a.b:8443'"),
        ("base_url = 'ftp://a.b'", "base_url = 'https://a.b'"),
        ("base_url = 'https://a.b:x'", "base_url = 'https://a.b:1'"),
        ("base_url = 'https://[x'", "base_url = 'http://[::1]:80/'"),
        (f"key = '{KEY}'", "key = 'env:ANTHROPIC_API_KEY'"),
    ],
)
def test_providers_are_checked(bad, good):
    """A key never travels in the clear and never stands in the file."""
    assert len(messages(f"schema = 1\n[providers.p]\n{bad}\n")) == 1
    assert messages(f"schema = 1\n[providers.p]\n{good}\n") == []


def test_a_literal_key_comes_with_the_way_out():
    """The refusal of a key tells where it belongs, and does not repeat it."""
    with pytest.raises(PolicyError) as caught:
        load(f"schema = 1\n[providers.p]\nkey = '{KEY}'\n", "p.toml")
    assert "file:~/.config/cloister/" in caught.value.remedy
    assert KEY not in str(caught.value) + caught.value.remedy


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ("state = ['/x']", "state = ['.x']"),
        ("carry = ['../x']", "carry = ['x']"),
        ("secrets = ['~']", "secrets = ['.x/auth.json']"),
        ("protect = ['.']", "protect = ['.x']"),
        ("pass_environment = ['LD_PRELOAD']", "pass_environment = ['X_MODEL']"),
        ("key_environment = ['A B']", "key_environment = ['X_API_KEY']"),
        ("files.'../x' = 'y'", "files.'.x/y' = 'y'"),
        (f"seed.'.x' = '{KEY}'", "seed.'.x' = '{}'"),
        ("base_url.anthropic = 'A-B'", "base_url.anthropic = 'X_BASE_URL'"),
        ("base_url.gopher = 'X_BASE_URL'", "base_url.openai = 'X_BASE_URL'"),
        ("base_url_arguments.openai = ['--url']", "base_url_arguments.openai = ['--url', '{base_url}']"),
        ("unix_socket = 'A-B'", "unix_socket = 'X_SOCKET'"),
        ("note = ['--note']", "note = ['--note={note}']"),
        ("note_file = '/etc/motd'", "note_file = '.x/NOTE.md'"),
        ("environment.LD_PRELOAD = 'x'", "environment.X_HOME = '{home}/.x'"),
        ("hosts = ['*']", "hosts = ['api.x.example']"),
    ],
)
def test_presets_are_checked(bad, good):
    """A preset is data from somebody else: its paths stay below the home, and it holds no secret."""
    with pytest.raises(PolicyError) as caught:
        load_preset(f"schema = 1\n{bad}\n", "preset x")
    assert len(caught.value.problems) == 1
    load_preset(f"schema = 1\n{good}\n", "preset x")


@pytest.mark.parametrize("table", ["every_agent", "agents.a"])
def test_project_files_are_checked(table):
    """A project file is read as strictly as a policy, before it is judged by what it asks for."""
    with pytest.raises(PolicyError):
        load_project(f"schema = 1\n[{table}.egress]\ndeny = ['127.1']\n", ".cloister.toml")
    load_project(f"schema = 1\n[{table}.egress]\ndeny = ['127.0.0.1']\n", ".cloister.toml")
    with pytest.raises(PolicyError):
        load_project("schema = 1\n[agents.'A b']\n", ".cloister.toml")


def test_provider_names_are_names():
    """They are referred to from agents and stand in paths of the proxy."""
    assert len(messages("schema = 1\n[providers.'a/b']\n")) == 1
    assert messages("schema = 1\n[providers.a-b]\n") == []


def test_audit_and_images_are_checked():
    """The tables that no backend uses yet are read as strictly."""
    assert len(messages("schema = 1\n[audit]\nretention = '9'\nsyslog = 'x'\n[images]\ntrust = ['00']\n")) == 3
    good = (
        f"schema = 1\n[audit]\nretention = '9d'\nsyslog = 'tls://log.example:6514'\n[images]\ntrust = ['{'0' * 64}']\n"
    )
    assert messages(good) == []


def test_the_bridge_of_microvms_is_a_private_24():
    """A network of others, one of another size, or none at all is refused; so is a user that is none."""
    for wrong in ("8.8.8.0/24", "10.0.0.0/16", "10.0.0.1/24", "fd00::/64", "bridge"):
        (message,) = messages(AGENT + f'[microvm]\nbridge = "{wrong}"\n')
        assert "private /24" in message
    assert messages(AGENT + '[microvm]\nbridge = "192.168.9.0/24"\nusers = ["ann"]\n') == []
    assert len(messages(AGENT + '[microvm]\nusers = ["a b"]\n')) == 1
