"""known_hosts: which keys a host may show, in every spelling OpenSSH writes."""

import base64
import hashlib
import hmac

import pytest

from cloister.credentials.ssh_keys import write_public
from cloister.credentials.ssh_known_hosts import HostKeys, KnownHosts, KnownHostsError, Place
from support.ssh_material import make_ecdsa, make_ed25519

ONE, TWO = make_ed25519(1), make_ecdsa()
PLACE = Place("git.example.org")


def hashed(name: str) -> str:
    """Return a name as `ssh-keygen -H` writes it."""
    salt = bytes(range(20))
    digest = hmac.new(salt, name.encode(), hashlib.sha1).digest()
    return f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"


def known(*names: str, place: Place = PLACE) -> frozenset[bytes]:
    """Return the keys of a place by lines with these first fields."""
    return KnownHosts(["".join(f"{name} {write_public(ONE.blob)} comment\n" for name in names)]).about(place).keys


@pytest.mark.parametrize(
    "names",
    ["git.example.org", "GIT.example.org", "a,git.example.org,b", "*.example.org", "git.example.???", "*",
     hashed("git.example.org"), "*.example.org,!www.example.org"],
)  # fmt: skip
def test_a_name_is_found_in_every_spelling(names: str) -> None:
    """Plain, in a list, by pattern, hashed."""
    assert known(names) == {ONE.blob}


@pytest.mark.parametrize(
    "names",
    ["example.org", "*.example.org,!git.example.org", "!git.example.org", "[git.example.org]:22", "git.example.orgx",
     "[git.example.org]:2222", hashed("www.example.org"), "|1|broken", "|1|!!|!!", "|2|x|y", "g[i]t.example.org",
     "@cert-authority *.example.org", "@unknown git.example.org", "# git.example.org"],
)  # fmt: skip
def test_other_names_are_not_it(names: str) -> None:
    """Negated, other names and ports, markers that mean something else, unreadable hashes."""
    assert known(names) == frozenset()


def test_a_port_is_part_of_the_name() -> None:
    """A key for port 22 is none for 2222, and the other way round."""
    place = Place("git.example.org", 2222)

    assert known("[git.example.org]:2222", place=place) == {ONE.blob}
    assert known(hashed("[git.example.org]:2222"), place=place) == {ONE.blob}
    assert known("git.example.org", place=place) == frozenset()


@pytest.mark.parametrize("where", ["git.example.org", "*", "elsewhere.example.org"])
def test_a_revoked_key_is_no_key_anywhere(where: str) -> None:
    """What was taken back once is not believed under another name; the other key of the host still is."""
    text = f"{PLACE.name} {write_public(ONE.blob)}\n{PLACE.name} {write_public(TWO.blob)}\n"
    revoked = f"@revoked {where} {write_public(ONE.blob)}\n"

    assert KnownHosts([text, revoked]).about(PLACE) == HostKeys(frozenset({TWO.blob}))


@pytest.mark.parametrize("line", ["@revoked * ssh-ed25519 !!", "@revoked *", "@revoked", "@revoked * ssh-rsa AAAA"])
def test_an_unreadable_revocation_stops_everything(line: str) -> None:
    """Nobody can tell which key it meant."""
    with pytest.raises(KnownHostsError):
        KnownHosts([line])


@pytest.mark.parametrize("line", ["", "x", "git.example.org", "git.example.org ssh-ed25519", "git.example.org a b c"])
def test_other_unreadable_lines_say_nothing(line: str) -> None:
    """They grant nothing, and do not hide the good ones."""
    good = f"{PLACE.name} {write_public(ONE.blob)}\n"

    assert KnownHosts([f"{line}\n{good}"]).about(PLACE).keys == {ONE.blob}


def test_what_is_written_is_read_again() -> None:
    """The file for the inside knows the allowed place and its keys."""
    place = Place("git.example.org", 2222)
    keys = HostKeys(frozenset({ONE.blob, TWO.blob}))

    assert KnownHosts(["\n".join(keys.lines(place))]).about(place) == keys
    assert KnownHosts(["\n".join(keys.lines(place))]).about(PLACE) == HostKeys()
