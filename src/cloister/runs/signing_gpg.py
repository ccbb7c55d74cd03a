"""Keys of a person's own gpg-agent: the named ones, what gpg inside needs to know of them, and git's settings.

gpg inside has a home of its own with the public keys, read-only, and finds the filtered socket by a
file that libassuan follows (assuan_sock_connect(3), "%Assuan%").
"""

from __future__ import annotations

from collections.abc import Mapping

from cloister.credentials.gpg_agent import GpgGrant
from cloister.errors import UnsupportedError
from cloister.host.gpg_keys import GpgError, GpgKey, wake_agent
from cloister.isolation.inner import BOX
from cloister.policy.model import Credential
from cloister.runs.signing_model import BoxFile, ServedAgent, Settings, Signing, Situation, Sources, wrong

_SOCKET = "gpg-agent.sock"
_HOME = ".gnupg"
_INSTALL = "sudo apt-get install gnupg"
_CONFIG = "# Made by cloister for this run: the keys are in the person's own gpg-agent.\nno-autostart\n"


def look_gpg(situation: Situation, named: Mapping[str, Credential]) -> tuple[Signing, Sources]:
    """Return what a run gets of the keys for gpg.

    Raises:
        PolicyError: gpg is missing, or does not know a key.
    """
    found = [
        (name, _find(name, key.removeprefix("gpg:"), situation))
        for name, credential in named.items()
        if "gpg" in credential.uses
        for key in credential.keys
        if key.startswith("gpg:")
    ]
    if not found:
        return Signing(), Sources()
    try:
        socket = situation.gpg_keys.agent_socket(home=situation.home, gnupg_home=_gnupg_home(situation))
    except GpgError as error:
        raise wrong("gpg-agent-missing", str(error), f".agents.{situation.agent}.credentials", _INSTALL) from error
    words = tuple(f"{name}: gpg {key.fingerprint} signs commits" for name, key in found)
    redirect = f"%Assuan%\nsocket={BOX}/{_SOCKET}\n"
    files = (
        BoxFile("gpg-public", home=f"{_HOME}/pubring.gpg", data=b"".join(key.public for _, key in found)),
        BoxFile("gpg-redirect", redirect, home=f"{_HOME}/S.gpg-agent"),
        BoxFile("gpg.conf", _CONFIG, home=f"{_HOME}/gpg.conf"),
    )
    doing_more = tuple(
        f"the gpg key {key.fingerprint} can also {' and '.join(key.also)}, and by a digest that is no different"
        for _, key in found
        if key.also
    )
    signing = Signing(
        agents=(ServedAgent("gpg", _SOCKET, words),),
        files=files,
        directories=(_HOME,),
        git=_settings(situation.git, found[0][1]),
        opt_outs=doing_more,
        spoken=("git signs commits and tags",),
    )
    grants = tuple(GpgGrant(name, key.fingerprint, frozenset(key.grips)) for name, key in found)
    return signing, Sources(gpg_grants=grants, gpg=socket)


def wake(sources: Sources, caller: Mapping[str, str]) -> None:
    """Have the person's gpg-agent run, as gpg outside would. May take seconds: not for the broker's loop.

    Raises:
        UnsupportedError: it does not start.
    """
    if sources.situation is None:
        return
    try:
        wake_agent(home=sources.situation.home, gnupg_home=_gnupg_home(sources.situation), caller=caller)
    except GpgError as error:
        raise UnsupportedError(
            "gpg-agent-silent", f"your gpg-agent does not start: {error}",
            where=f".agents.{sources.agent}.credentials", remedy="gpgconf --launch gpg-agent",
        ) from error  # fmt: skip


def _find(name: str, fingerprint: str, situation: Situation) -> GpgKey:
    try:
        return situation.gpg_keys.find(fingerprint, home=situation.home, gnupg_home=_gnupg_home(situation))
    except GpgError as error:
        where = f".agents.{situation.agent}.credentials.{name}.keys"
        raise wrong("key-missing", str(error), where, "gpg --list-keys --with-subkey-fingerprint") from error


def _gnupg_home(situation: Situation) -> str:
    value = situation.environment.get("GNUPGHOME", "")
    return value if value.startswith("/") else ""


def _settings(person: Mapping[str, str], key: GpgKey) -> Settings:
    """Return git's settings: this key, and signing without being asked where the person's git does so."""
    exact = "!" if key.subkey else ""  # gpg(1), "How to specify a user ID"
    settings = [("gpg.format", "openpgp"), ("user.signingkey", f"{key.fingerprint}{exact}")]
    if person.get("gpg.format", "openpgp") == "openpgp":
        settings += [(name, person[name]) for name in ("commit.gpgsign", "tag.gpgsign") if name in person]
    return tuple(settings)
