"""`cloister completion`: scripts that complete verbs, options, agents and runs in bash, zsh and fish.

Made from the same texts as the manual pages (`manual.texts`), so no option is forgotten. Names
that change (agents, runs) are asked for while typing: `complete`.
"""

from __future__ import annotations

import re
import sys

from cloister.cli.arguments import Parser
from cloister.cli.entry import VERBS
from cloister.cli.manual import Option, VerbText, texts

_DYNAMIC = {"AGENT": "agents", "RUN": "runs"}
_LIVING = ("exec", "shell", "stop")
_FILES = ("FILE", "DIR", "PATH|HOST[:PORT]")


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "completion",
        "Print a script that completes cloister's words in a shell.",
        prose="Packages install these scripts where shells look for them; by hand, evaluate the output at login.",
        examples=(
            ("cloister completion bash", "for ~/.bashrc: source <(cloister completion bash)"),
            ("cloister completion zsh", "for a file named _cloister on the fpath"),
            ("cloister completion fish", "for ~/.config/fish/completions/cloister.fish"),
        ),
    )
    verb.add_argument("shell", metavar="SHELL", choices=["bash", "zsh", "fish"], help="bash, zsh or fish")
    return verb


def main(argv: list[str]) -> int:
    """Print the script."""
    shell = parser().read(argv).shell
    sys.stdout.write({"bash": bash, "zsh": zsh, "fish": fish}[shell]())
    return 0


def _kind(verb: VerbText, value: str) -> str:
    """Return what completes a value: `agents`, `runs`, `living`, `profiles`, `files`, or nothing."""
    if value == "NAME":
        return ""
    if value in _FILES:
        return "files"
    kind = _DYNAMIC.get(value, "")
    return "living" if kind == "runs" and verb.verb in _LIVING else kind


def _option_kind(verb: VerbText, option: Option) -> str:
    return "profiles" if "--profile" in option.names else _kind(verb, option.value)


def _words(verb: VerbText) -> list[str]:
    return [name for option in verb.options for name in option.names if name.startswith("-")]


def _choices(verb: VerbText) -> list[str]:
    return [word for argument in verb.arguments for word in argument.choices]


def bash() -> str:
    """Return the script for bash (4.3 or newer), without need of bash-completion."""
    cases = []
    for verb in texts():
        takers: dict[str, list[str]] = {}
        for option in verb.options:
            if option.value:
                takers.setdefault(_option_kind(verb, option), []).extend(option.names)
        values = "".join(f" {'|'.join(names)}) kind={kind or 'none'} ;;" for kind, names in sorted(takers.items()))
        kinds = [_kind(verb, argument.value) or "none" for argument in verb.arguments] or ["none"]
        cases.append(
            f"        {verb.verb})\n"
            f"            options='{' '.join(_words(verb))}' words='{' '.join(_choices(verb))}'\n"
            f"            kinds=({' '.join(kinds)})\n"
            f"            case $previous in{values} *) ;; esac ;;"
        )
    return _BASH.format(verbs=" ".join((*VERBS, "help", "version")), cases="\n".join(cases))


_BASH = """\
# bash completion for cloister; made by `cloister completion bash`
_cloister() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} verb=${{COMP_WORDS[1]}}
    local options= words= kind= kinds=(none) place=-1 index
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W '{verbs}' -- "$current"))
        return
    fi
    for ((index = 2; index <= COMP_CWORD; index++)); do
        if [[ ${{COMP_WORDS[index]}} == -- ]] && ((index < COMP_CWORD)); then
            COMPREPLY=($(compgen -f -- "$current"))
            return
        fi
        [[ ${{COMP_WORDS[index]}} == -?* ]] || ((place++))
    done
    case $verb in
{cases}
    esac
    ((place == 0)) || words=
    if [[ -z $kind && $current == -* ]]; then
        COMPREPLY=($(compgen -W "$options" -- "$current"))
        return
    fi
    if [[ -z $kind ]]; then
        ((place < ${{#kinds[@]}})) || place=$((${{#kinds[@]}} - 1))
        kind=${{kinds[place]}}
    fi
    case $kind in
        files) COMPREPLY=($(compgen -f -- "$current")) ;;
        agents|runs|living|profiles)
            COMPREPLY=($(compgen -W "$(cloister __complete "$kind" 2>/dev/null) $words" -- "$current")) ;;
        *) COMPREPLY=($(compgen -W "$words" -- "$current")) ;;
    esac
}}
complete -o filenames -F _cloister cloister
"""


def zsh() -> str:
    """Return the script for zsh: a file named `_cloister` on the fpath."""
    verbs = "\n".join(f"        {_zsh_quoted(f'{name}:{what}')}" for name, what in VERBS.items())
    cases = []
    for verb in texts():
        specs = [_zsh_option(verb, option) for option in verb.options if option.names[0].startswith("-")]
        specs += [_zsh_argument(verb, argument, last=argument is verb.arguments[-1]) for argument in verb.arguments]
        cases.append(
            f"        {verb.verb})\n            _arguments -s \\\n                "
            + " \\\n                ".join(specs)
            + " ;;"
        )
    return _ZSH.format(verbs=verbs, cases="\n".join(cases))


def _zsh_quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _zsh_option(verb: VerbText, option: Option) -> str:
    text = re.sub(r"([\[\]:\\])", r"\\\1", option.text)
    action = f":{option.value}:{_zsh_action(_option_kind(verb, option))}" if option.value else ""
    names = f"{{{','.join(option.names)}}}" if len(option.names) > 1 else option.names[0]
    return f"{names}{_zsh_quoted(f'[{text}]{action}')}"


def _zsh_argument(verb: VerbText, argument: Option, *, last: bool) -> str:
    action = f"({' '.join(argument.choices)})" if argument.choices else _zsh_action(_kind(verb, argument.value))
    name = re.sub(r"[^A-Z]", " ", argument.value).strip().lower()
    return _zsh_quoted(f"{'*' if last else ''}:{name}:{action}")


def _zsh_action(kind: str) -> str:
    return {"": " ", "files": "_files"}.get(kind, f"{{_cloister_words {kind}}}")


_ZSH = """\
#compdef cloister
# zsh completion for cloister; made by `cloister completion zsh`

_cloister_words() {{
    local -a found
    found=(${{(f)"$(cloister __complete $1 2>/dev/null)"}})
    compadd -a found
}}

_cloister() {{
    local -a verbs
    verbs=(
{verbs}
    )
    if ((CURRENT == 2)); then
        _describe verb verbs
        return
    fi
    local verb=$words[2]
    shift words
    ((CURRENT--))
    case $verb in
{cases}
        *) _files ;;
    esac
}}

if [[ $funcstack[1] == _cloister ]]; then
    _cloister "$@"
else
    compdef _cloister cloister
fi
"""


def fish() -> str:
    """Return the script for fish."""
    lines = ["# fish completion for cloister; made by `cloister completion fish`", "complete -c cloister -f"]
    lines += [
        f"complete -c cloister -n __fish_use_subcommand -a {name} -d {_fish_quoted(what)}"
        for name, what in VERBS.items()
    ]
    for verb in texts():
        seen = f"-n '__fish_seen_subcommand_from {verb.verb}'"
        for option in verb.options:
            if option.names[0].startswith("-"):
                names = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names]
                value = f" -r{_fish_action(_option_kind(verb, option))}" if option.value else ""
                lines.append(f"complete -c cloister {seen} {' '.join(names)}{value} -d {_fish_quoted(option.text)}")
        for argument in verb.arguments:
            action = _fish_action(_kind(verb, argument.value))
            if argument.choices:
                action = f" -a {_fish_quoted(' '.join(argument.choices))}"
            if action:
                lines.append(f"complete -c cloister {seen}{action}")
    return "\n".join(lines) + "\n"


def _fish_action(kind: str) -> str:
    return {"": "", "files": " -F"}.get(kind, f" -a '(cloister __complete {kind} 2>/dev/null)'")


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
