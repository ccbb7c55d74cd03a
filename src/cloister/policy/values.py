"""Whether one value of a policy is well formed: names, paths, variables, references, addresses.

Each function returns nothing and raises ValueError with a sentence for people; putting a
file and a line to it is for `check`. Nothing here looks at the machine: whether a path
exists, and where a symlink leads, is judged when the plan is compiled and again when it is
applied.
"""

from __future__ import annotations

import fnmatch
import ipaddress
import re
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from cloister.policy.hosts import parse_network
from cloister.policy.secretscan import looks_secret
from cloister.policy.units import parse_size

_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_REFERENCE = re.compile(r"(file|env|systemd|command|keyring|pass|login):(.+)", re.DOTALL)
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}")  # token, RFC 9110 section 5.6.2
_PUBLIC_KEY = re.compile(r"[0-9a-f]{64}")

_LOADER_VARIABLES = (
    "LD_*",  # ld.so(8)
    "GCONV_PATH",
    "GETCONF_DIR",
    "GLIBC_TUNABLES",
    "HOSTALIASES",
    "LOCALDOMAIN",
    "LOCPATH",
    "MALLOC_*",
    "NLSPATH",
    "RESOLV_HOST_CONF",
    "RES_OPTIONS",
    "BASH_ENV",  # bash(1): run before any script
    "BASH_FUNC_*",
    "BASHOPTS",
    "ENV",
    "IFS",
    "PROMPT_COMMAND",
    "PS4",
    "SHELLOPTS",
)
_OWN_VARIABLES = ("HOME", "CLOISTER_*", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "FTP_PROXY")
_KERNEL_TREES = ("/proc", "/sys", "/dev")
_SYSTEM_TREES = ("/bin", "/boot", "/etc", "/lib", "/lib64", "/nix", "/root", "/run", "/sbin", "/usr", "/var/run")
_TOO_WIDE = ("/", "/home", "/mnt", "/media", "/opt", "/root", "/run", "/srv", "/var", "/var/lib")
_SHARED = ("/tmp", "/var/tmp")  # noqa: S108  refused here, not used
_OWN_DIRECTORIES = (
    "~/.config/cloister",
    "~/.local/share/cloister",
    "~/.local/state/cloister",
    "~/.cache/cloister",
    "/etc/cloister",
    "/var/lib/cloister",
)


def check_name(name: str) -> None:
    """Accept what may name an agent, a profile, a provider or a credential: it becomes a part of paths and units."""
    if not _NAME.fullmatch(name):
        raise ValueError("a name begins with a letter and has up to 32 of a-z, 0-9 and -")


def check_user(name: str) -> None:
    """Accept a login name as useradd(8) makes them."""
    if not _USER.fullmatch(name):
        raise ValueError("a user name begins with a letter or _ and has up to 32 of a-z, 0-9, _ and -")


def check_variable(name: str) -> None:
    """Accept a POSIX variable name that neither steers the loader or shell nor belongs to Cloister."""
    if not _VARIABLE.fullmatch(name):
        raise ValueError("a variable name has letters, digits and _ and begins with no digit")
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in _LOADER_VARIABLES):
        raise ValueError("this variable makes the loader, the resolver or the shell run something: it is never carried")
    if any(fnmatch.fnmatchcase(name.upper(), pattern) for pattern in _OWN_VARIABLES):
        raise ValueError("Cloister sets this variable itself")


def check_plain_value(value: str) -> None:
    """Refuse a value that is a secret by its looks: policies are readable, printed and kept in stores."""
    if looks_secret(value):
        raise ValueError("this looks like a secret itself, and a policy is no place for one")


def check_reference(reference: str) -> None:
    """Accept `file:PATH`, `env:NAME`, `systemd:NAME`, `command:ARGV`, `keyring:NAME`, `pass:NAME` or `login:NAME`."""
    found = _REFERENCE.fullmatch(reference)
    if found is None:
        check_plain_value(reference)
        raise ValueError("a secret reference begins with file:, env:, systemd:, command:, keyring:, pass: or login:")
    scheme, target = found[1], found[2]
    check_plain_value(target)
    if "\n" in target or target != target.strip():
        raise ValueError("a secret reference has no line breaks and no spaces around it")
    if scheme == "env" and not _VARIABLE.fullmatch(target):
        raise ValueError("env: is followed by the name of a variable")
    if scheme == "login":
        check_name(target)
    if scheme == "systemd" and (not re.fullmatch(r"[A-Za-z0-9._-]{1,255}", target) or target in {".", ".."}):
        raise ValueError("systemd: is followed by the name of a credential")
    if scheme == "file" and not target.startswith(("/", "~/")):
        raise ValueError("file: is followed by an absolute path or one that begins with ~/")


def check_host_path(path: str) -> None:
    """Accept a path on the host: absolute, or below the home (`~/x` or `x`); not so wide that it holds everything."""
    _check_path_text(path)
    normal = _normal(path)
    if normal == "~":
        raise ValueError("the whole home is never shown: name the directories in it")
    if normal in _TOO_WIDE + _SHARED:
        raise ValueError(f"{normal} is never shown as a whole: name what is needed below it")


def check_read_path(path: str) -> None:
    """Accept a path that may be shown: no kernel file system, nothing of Cloister's own, and no socket.

    A socket that is mounted read-only can still be connected to (connect(2) asks for write permission on
    the inode only, not on the mount).
    """
    check_host_path(path)
    normal = _normal(path)
    if any(_within(normal, tree) for tree in _KERNEL_TREES):
        raise ValueError("the sandbox has its own /proc, /sys and /dev")
    if _within(normal, "/run/user") or normal.endswith((".sock", ".socket")):
        raise ValueError("sockets lead out of the sandbox, and read-only does not stop a connection")
    _check_not_own(normal)


def check_file_path(path: str) -> None:
    """Accept a file of the host that we read ourselves: absolute, or below the home."""
    _check_path_text(path)
    if not path.startswith(("/", "~/")):
        raise ValueError("write the whole path, or one that begins with ~/")


def check_write_path(path: str) -> None:
    """Accept a path that may be writable: one that may be shown, and no system directory."""
    check_read_path(path)
    normal = _normal(path)
    if any(_within(normal, tree) for tree in _SYSTEM_TREES):
        raise ValueError("system directories are never writable in a sandbox")


def check_inner_path(path: str) -> None:
    """Accept a path below the workspace or below the home: relative, without `..`."""
    _check_path_text(path)
    if path.startswith(("/", "~")):
        raise ValueError("this path is relative: it begins with neither / nor ~")
    if _normal(path) == "~":
        raise ValueError("this path names the directory itself, not something in it")


def check_home_path(path: str) -> None:
    """Accept a path below the home, written `~/x` or `x`."""
    _check_path_text(path)
    if path.startswith("/"):
        raise ValueError("this path is below the home: write it as ~/NAME")
    check_host_path(path)
    _check_not_own(_normal(path))


def check_network(text: str) -> None:
    """Accept a CIDR that may be an exception from the refused private ranges."""
    network = parse_network(text)
    never = ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3", "::/96", "fe80::/10", "ff00::/8")
    for other in never:
        wide = ipaddress.ip_network(other)
        if wide.version == network.version and wide.overlaps(network):
            raise ValueError(f"{other} is never opened: it is the host itself, its metadata service or multicast")


def check_base_url(url: str) -> None:
    """Accept `https://host[:port][/path]`, and `http://` for loopback only: keys travel on it."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError("not an address such as https://api.example.org") from error
    if parts.scheme not in {"http", "https"} or not host or not url.isprintable() or " " in url:
        raise ValueError("not an address such as https://api.example.org")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("an address here has no user, password, query or fragment")
    if parts.scheme == "http" and host not in {"127.0.0.1", "::1", "localhost"}:
        raise ValueError("http:// would send the key in the clear: only loopback may use it")


def check_upstream_proxy(text: str) -> None:
    """Accept nothing, `env`, or `http://host:port`."""
    if text in {"", "env"}:
        return
    parts = urlsplit(text)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme != "http" or not parts.hostname or not port or parts.path not in {"", "/"} or "@" in parts.netloc:
        raise ValueError('an upstream proxy is http://host:port, or "env" for the https_proxy of the host')


def check_segment(text: str) -> None:
    """Accept a size of at least 64 KiB: a segment holds its own heads and more."""
    if parse_size(text) < 64 << 10:
        raise ValueError("a segment of the log has at least 64K")


def check_syslog(text: str) -> None:
    """Accept `unix`, or `udp://`, `tcp://`, `tls://` with a host and a port."""
    if text != "unix" and not re.fullmatch(r"(udp|tcp|tls)://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}", text):
        raise ValueError("write unix, udp://host:514, tcp://host:601 or tls://host:6514")


def check_otlp(text: str) -> None:
    """Accept an `https://` or `http://` address of a collector, with no user, query or fragment."""
    if not re.fullmatch(
        r"https?://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?(?:/[A-Za-z0-9._~/-]*)?", text
    ):
        raise ValueError("write https://host:4318, or with a path https://host/v1/logs")


def check_alarm(text: str) -> None:
    """Accept a receiver of syslog, or `file:` with the absolute path of a file that holds a webhook's address."""
    if text.startswith("file:"):
        check_file_path(text.removeprefix("file:"))
        return
    try:
        check_syslog(text)
    except ValueError as error:
        raise ValueError(f"{error}; or file:PATH, a file with the https address of a webhook") from None


def check_header(name: str) -> None:
    """Accept the name of a header (RFC 9110)."""
    if not _HEADER.fullmatch(name):
        raise ValueError("not the name of a header")


_KEY_NAME = re.compile(r"SHA256:[A-Za-z0-9+/]{43}|gpg:(?:[0-9A-Fa-f]{40}|[0-9A-Fa-f]{64})")


def check_key(text: str) -> None:
    """Accept what names a key of an ssh-agent or gpg-agent: `SHA256:…`, `gpg:FINGERPRINT`, or a `.pub` file's path."""
    if _KEY_NAME.fullmatch(text):
        return
    if not text.endswith(".pub"):
        raise ValueError("a key is named by SHA256:…, by gpg:FINGERPRINT, or by the path of its .pub file")
    _check_path_text(text)


def check_model(text: str) -> None:
    """Accept the name of a model or a pattern of names, `*` and `?` being its only signs."""
    if not text or len(text) > 256 or not text.isprintable() or any(sign in text for sign in ' "\\[]'):  # noqa: PLR2004
        raise ValueError("a model is up to 256 visible characters without quotes, spaces and brackets")


def check_audience(text: str) -> None:
    """Accept the audience of a token: any visible text (RFC 7519, section 4.1.3)."""
    if not text or len(text) > 256 or not text.isprintable() or " " in text:  # noqa: PLR2004
        raise ValueError("an audience is up to 256 visible characters without spaces")


def check_pattern(text: str) -> None:
    """Accept a regular expression."""
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"not a regular expression: {error}") from None
    if not text or len(text) > 1000:  # noqa: PLR2004
        raise ValueError("a pattern has 1 to 1000 characters")


def check_public_key(text: str) -> None:
    """Accept an Ed25519 public key: 32 bytes in hexadecimal."""
    if not _PUBLIC_KEY.fullmatch(text):
        raise ValueError("a public key is 64 hexadecimal digits")


def check_bridge(text: str) -> None:
    """Accept a private /24 (RFC 1918)."""
    try:
        network = ipaddress.IPv4Network(text)
    except ValueError:
        network = None
    private = network and any(network.subnet_of(ipaddress.IPv4Network(one)) for one in _PRIVATE)
    if not private or network is None or network.prefixlen != 24:  # noqa: PLR2004  # what taps are named after
        raise ValueError("the bridge's network is a private /24, such as 10.0.0.0/24")


_PRIVATE = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")


def _check_path_text(path: str) -> None:
    if not path or len(path.encode()) > 4096:  # noqa: PLR2004  PATH_MAX, limits.h
        raise ValueError("a path has 1 to 4096 bytes")
    if not path.isprintable():
        raise ValueError("a path in a policy has no line breaks or control characters")
    if any(sign in path for sign in "*?["):
        raise ValueError("wildcards are not expanded in paths: name a directory")
    if ".." in PurePosixPath(path).parts:
        raise ValueError("a path in a policy has no ..")
    if path.startswith("~") and path != "~" and not path.startswith("~/"):
        raise ValueError("~ stands for the caller's own home only: write ~/NAME or an absolute path")


def _check_not_own(normal: str) -> None:
    """Keep Cloister's own keys out of reach, and its rules from being rewritten by whom they bind."""
    if any(_within(normal, own) or _within(own, normal) for own in _OWN_DIRECTORIES):
        raise ValueError("Cloister's own policy, keys or state lie there: name what is needed beside them")


def _normal(path: str) -> str:
    """Return the path without `.`, `//` and a closing slash; one that is relative is below the home."""
    if path.startswith("/"):
        return "/" + "/".join(part for part in path.split("/") if part not in {"", "."})
    parts = [part for part in path.removeprefix("~").split("/") if part not in {"", "."}]
    return "/".join(["~", *parts])


def _within(path: str, tree: str) -> bool:
    return path == tree or path.startswith(tree + "/")
