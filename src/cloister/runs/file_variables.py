"""Variables that come from files: the home's own `.env` of a product, and those that the policy names.

What counts, from weak to strong: the home's file, the caller's variables that the policy passes, the policy's
`environment`, the policy's `environment_files` in their order. Values are put in at launch, like the caller's: no plan,
log or store has them. A name that loads code comes from no file (`policy.dotenv.check_file_variable`). A secret in the
home's file stays out, and the person is told; one in a file of the policy is a mistake.
"""

from __future__ import annotations

from collections.abc import Iterable

from cloister.errors import PolicyError, Problem
from cloister.host.plain_files import RefusedError, read_home, read_policy_file
from cloister.policy.dotenv import MAX_BYTES, DotenvError, check_file_variable, parse
from cloister.policy.model import Agent
from cloister.policy.secretscan import looks_secret, names_secret
from cloister.policy.variables import variables
from cloister.runs.home_files import NOT_READ


class FileVariables:
    """Variables by where they come from. Shows no value."""

    __slots__ = ("home", "notices", "policy")

    def __init__(self, home: dict[str, str], policy: dict[str, str], notices: tuple[str, ...] = ()) -> None:
        """Keep them apart: the first count least, the second most."""
        self.home = home
        self.policy = policy
        self.notices = notices


def of_home(home: str, name: str, agent: Agent, forbidden: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the variables of a product's own file below a home, and what there is to say of it.

    Args:
        home: the user's home.
        name: the file below it; empty for none.
        agent: its credentials' variables are not for a file to set.
        forbidden: directories that an agent can write.
    """
    if not name:
        return {}, ()
    try:
        data = read_home(home, name, MAX_BYTES, forbidden)
        found = parse(data.decode("utf-8")) if data else {}
    except RefusedError as error:
        return {}, (f"~/{name} was not read: {error} {NOT_READ}",)
    except DotenvError as error:
        return {}, (f"~/{name} was not read: line {error.line}: {error} {NOT_READ}",)
    except UnicodeDecodeError:
        return {}, (f"~/{name} was not read: it is not UTF-8 {NOT_READ}",)
    kept = fit(found, agent)
    if left := sorted(set(found) - set(kept)):
        shown = ", ".join(left[:8]) + (", …" if len(left) > 8 else "")  # noqa: PLR2004  # one line
        return kept, (f"~/{name}: {shown} stayed out (secrets belong into credentials; others would load code)",)
    return kept, ()


def fit(found: dict[str, str], agent: Agent) -> dict[str, str]:
    """Return those that may come from a file that is not the policy's."""
    taken = _placeholders(agent)
    return {name: value for name, value in found.items() if name not in taken and not _why_not(name, value)}


def of_policy(agent: Agent, name: str, *, home: str, owners: Iterable[int], forbidden: Iterable[str]) -> dict[str, str]:
    """Return the variables of an agent's `environment_files`.

    Args:
        agent: names the files.
        name: its name, for messages.
        home: what `~/` stands for; empty where nobody's home is meant.
        owners: uids that a file may belong to.
        forbidden: directories that an agent can write.

    Raises:
        PolicyError: `environment-file`: a file that cannot be used, or a variable that no file may set.
    """
    found: dict[str, str] = {}
    taken = _placeholders(agent)
    for index, path in enumerate(agent.environment_files):
        where = f".agents.{name}.environment_files.{index}"
        for key, value in _file(path, where, home, owners, forbidden).items():
            why = "it holds a placeholder here" if key in taken else _why_not(key, value)
            if why:
                remedy = f"[agents.{name}.credentials.NAME] for secrets, `environment` for what must be set"
                raise _wrong(f"{path} sets {key}: {why}", where, remedy)
            found[key] = value
    return found


def _file(path: str, where: str, home: str, owners: Iterable[int], forbidden: Iterable[str]) -> dict[str, str]:
    if path.startswith("~/") and not home:
        raise _wrong(f"{path} is below nobody's home: the system's broker reads it", where, "name an absolute path")
    full = home + path[1:] if path.startswith("~/") else path
    try:
        return parse(read_policy_file(full, owners, MAX_BYTES, forbidden).decode("utf-8"))
    except RefusedError as error:
        raise _wrong(f"{path} cannot be used: {error}", where, f"ls -l {full}") from None
    except DotenvError as error:
        raise _wrong(f"{path}, line {error.line}: {error}", where, "see cloister.toml(5)") from None
    except UnicodeDecodeError:
        raise _wrong(f"{path} is not UTF-8", where, "") from None


def _why_not(name: str, value: str) -> str:
    try:
        check_file_variable(name)
    except ValueError as error:
        return str(error)
    if names_secret(name) or looks_secret(value):
        return "this is a secret by its name or its looks"
    return ""


def _placeholders(agent: Agent) -> set[str]:
    return {variable for one in agent.credentials.values() for variable in variables(one)}


def _wrong(message: str, where: str, remedy: str) -> PolicyError:
    return PolicyError([Problem(message, where, remedy)], reference="environment-file")
