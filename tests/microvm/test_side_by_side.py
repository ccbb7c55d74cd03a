"""A run in a microVM beside one in a namespace: whatever a caller or an agent asks of both has the same answer.

What differs is in docs/microvm.md, "What is different", and not here. One guest lives for all of these.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from support.guest_user import BOOT_S, Installs
from support.side_by_side import SIDES, Answer, Pair
from support.terminal import Terminal


@pytest.fixture(scope="module")
def pair(image: Installs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Both sides, each with a run that lives."""
    made = Pair(tmp_path_factory.mktemp("sides"), image)
    made.live()
    yield made
    made.call("namespace", "stop", "--all", "--grace", "1s")
    made.user.close()


# --- what an agent finds ---------------------------------------------------------------------------

INSIDE = {
    "where it is": "pwd; echo $PWD; cat README; cat sub/f",
    "its variables": "env | grep -v ^_= | sort",
    "who it is": "id; whoami; groups; hostname",
    "its umask and limits": "umask; ulimit -c; ulimit -s; nice",
    "its rights": "grep -E '^(Cap|NoNewPrivs|Seccomp:|Groups|SigBlk)' /proc/self/status",
    "its home": 'cd; pwd; stat -c "%a %U" .; echo x > here && cat here; ls ~/.ssh ~/.config',
    "temporary files": "for d in /tmp /var/tmp /dev/shm; do echo x > $d/side && cat $d/side; done; echo $TMPDIR",
    "files": "find . -path ./.git -prune -o -type f -print0 | sort -z | xargs -0 stat -c '%n %a %s' | grep -v '^./\\.'",
    "times": "stat -c '%n %y' README data script sub/deep/g link holes",
    "links": "ls -l link dangling | grep -o 'link.*\\|dangling.*'; stat -c %h data; test data -ef second-name; echo $?",
    "holes": "du -k holes | cut -f1",
    "git": "git status --porcelain=v2; git log --oneline --format=%s; git rev-parse --show-toplevel; git diff --stat",
    "git's settings": "git config -l | sort",
    "what git would commit": "git add -An | sort",
    "protected names": "for n in .git/hooks/x .env .mcp.json .vscode/x; do (echo x > $n) 2>/dev/null; echo $?; done",
    "stand-ins": "cat .mcp.json; wc -c < .env; ls -d .vscode .envrc refs; rm -f .env; echo $?",
    "its network": "python3 -c 'import socket; s = socket.socket(); print(s.connect_ex((\"192.0.2.1\", 80)))'",
    "names": "python3 -c 'import socket; print(socket.getaddrinfo(\"localhost\", 80)[0][4])'; getent hosts example.org",
    "its own servers": (
        "python3 -c 'import socket; s = socket.socket(); s.bind((\"127.0.0.1\", 8099)); s.listen();"
        " print(socket.create_connection((\"127.0.0.1\", 8099)).getpeername())'"
    ),
    "a denied host": (
        "python3 -c 'import urllib.request as r, urllib.error\n"
        'try: r.urlopen("http://denied.example.org/")\n'
        "except urllib.error.HTTPError as e: print(e.code, e.read().decode())'"
    ),
    "the clock": "date +%Z; cat /etc/timezone",
    "devices": "head -c 4 /dev/urandom | wc -c; mkfifo /tmp/fifo; echo $?; echo x > /dev/null; ls /dev/stdin /dev/fd/0",
    "processes": "(sleep 99 & kill $!; wait $!; echo $?) 2>&-; unshare -U true; echo $?",
    "a program's end": "sh -c 'exit 7'; echo $?; sh -c 'kill -KILL $$'; echo $?; nowhere; echo $?; ./data; echo $?",
}  # fmt: skip


@pytest.fixture(scope="module")
def views(pair: Pair) -> dict[str, dict[str, str]]:
    """What both say to all of these."""
    return pair.views(INSIDE)


@pytest.mark.parametrize("name", INSIDE)
def test_an_agent_finds_the_same(pair: Pair, views: dict[str, dict[str, str]], name: str) -> None:
    """A guest looks to a program as a namespace does."""
    first, second = (pair.same(side, views[side][name].encode()).decode() for side in SIDES)

    assert first == second
    assert len(first) > len("0 ")


# --- what a caller gets ----------------------------------------------------------------------------

SCRIPT = ("/bin/sh", "-c")
COMMANDS: dict[str, tuple[str, ...]] = {
    "exit code": (*SCRIPT, "exit 77"),
    "124": (*SCRIPT, "exit 124"),
    "SIGKILL": (*SCRIPT, "kill -KILL $$"),
    "SIGRTMIN": (*SCRIPT, "kill -RTMIN $$; sleep 1"),
    "missing": ("no-such-program",),
    "missing path": ("./no-such",),
    "not executable": ("./data",),
    "a directory": ("/tmp",),
    "no interpreter": ("./no-interpreter",),
    "a script": ("./script", "one", "two words"),
    "arguments of any bytes": ("/usr/bin/printf", "%s|", "", "a b", "\n", "\udcff\udcfe", "ü", "--", "*"),
    "a megabyte of arguments": ("/usr/bin/env", "sh", "-c", "echo $#", *["x" * 1000] * 1000),
    "both outputs": (*SCRIPT, "echo out; echo err >&2"),
    "work in the background": (*SCRIPT, "(sleep 0.5; echo late) & echo now"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_caller_gets_the_same(pair: Pair, name: str) -> None:
    """Exit code, output and words about what cannot be started."""
    first, second = pair.both(*COMMANDS[name])

    assert first == second


STREAMS = {
    "nothing on standard input": ('"$@" </dev/null', "cat; echo $?"),
    "closed standard input": ('"$@" <&-', "cat; echo $?"),
    "closed standard output": ('"$@" >&-', "echo x; echo $? >&2"),
    "all closed": ('"$@" <&- >&- 2>&-; echo $?', "exit 7"),
    "a reader that leaves": ('"$@" | head -2; echo ${PIPESTATUS[0]}', "exec yes"),
    "one file for both outputs": (
        'f=$(mktemp); "$@" >$f 2>&1; cat $f; rm $f', "for i in 1 2 3 4 5; do echo o$i; echo e$i >&2; done"
    ),
    "a file that goes on": ('f=$(mktemp); (echo a; "$@"; echo z) >$f; cat $f; rm $f', "echo inside"),
    "input that nobody reads": ('head -c 3000000 /dev/zero | "$@"; echo $?', "exit 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", STREAMS)
def test_streams_are_the_same(pair: Pair, name: str) -> None:
    """However the caller's shell has set them up."""
    shell, script = STREAMS[name]
    first, second = pair.both(*SCRIPT, script, shell=shell)

    assert first == second


def test_a_stream_of_bytes_is_the_same(pair: Pair) -> None:
    """Every value, both ways, more than any buffer holds."""
    data = bytes(range(256)) * 20_000
    for answer in pair.both("cat", stdin=data):
        assert answer == Answer(0, data, b"")


ON_TERMINAL = {
    "size": ("tty; stty size; stty -a | tr ';' '\\n' | sed -n 1,12p; exit 4", ()),
    "resize": ("trap 'stty size; exit 0' WINCH; echo up; while :; do sleep 0.05; done", ("up", (50, 132))),
    "ctrl-c": ("trap 'echo caught; exit 3' INT; echo up; while :; do sleep 0.05; done", ("up", "\x03")),
    "ctrl-c, not caught": ("echo up; exec sleep 99", ("up", "\x03")),
    "ctrl-d": ("stty -echo; echo up; cat; echo over", ("up", "one\r\x04")),
    "raw": ("stty raw -echo; echo up; head -c 5 | od -An -tx1", ("up", "\x03\x04\x1a\r\x7f")),
}


@pytest.mark.parametrize("name", ON_TERMINAL)
def test_terminals_are_the_same(pair: Pair, name: str) -> None:
    """Size, its changes, keys and modes; and the caller's terminal is afterwards as it was."""
    script, acts = ON_TERMINAL[name]
    first, second = (_typed(pair, side, script, acts) for side in SIDES)

    assert first == second
    assert first[2]


def _typed(pair: Pair, side: str, script: str, acts: tuple[str | tuple[int, int], ...]) -> tuple[int, object, bool]:
    command = pair.user.command("exec", pair.runs[side], "--", *SCRIPT, script)
    with Terminal(command, cwd=pair.projects[side], env=pair.user.environment, size=(33, 77)) as terminal:
        if acts:
            terminal.until(str(acts[0]), BOOT_S)
        for act in acts[1:]:
            if isinstance(act, str):
                terminal.type(act)
            else:
                terminal.resize(*act)
        code = terminal.wait(BOOT_S)
        # The kernel sends the signal first, and echoes the key then: whoever is quick prints before that.
        echoed, shown = terminal.shown.count(b"^C"), terminal.shown.replace(b"^C", b"")
        return code, (echoed, shown), terminal.restored


def test_verbs_say_the_same(pair: Pair) -> None:
    """`ps`, `logs`, `explain`, `why`, `plan` of both, but for what they say about a guest's own machine."""
    for words in (
        ("logs", "RUN"), ("why", "RUN"), ("explain", "SIDE", "README"), ("explain", "SIDE", "example.org"),
        ("explain", "SIDE", ".git/hooks"), ("receipt", "RUN"),
    ):  # fmt: skip
        first, second = (
            pair.call(side, *(pair.runs[side] if word == "RUN" else word.replace("SIDE", side) for word in words))
            for side in SIDES
        )
        assert first == second, words


# --- what is left behind --------------------------------------------------------------------------

WORK = """
echo more >> README; rm read-only; mv data moved; mkdir -p a/b; echo x > a/b/c; ln -s README made-link
chmod 755 private; chmod 400 sub/f; : > none; rm -r empty-directory sub/deep; mkdir made-empty
touch -d @1234567890.5 timed
cp -p script script2; echo y > .hidden; mv sub moved-sub; echo file > sub; truncate -s 3M more-holes
printf z > "$(printf 'z\\377')"; mkdir -p .venv/bin; ln -s /usr/bin/python3 .venv/bin/python
umask 077; echo p > mine; git add -A; git commit -qm work; git gc -q; git tag done; git checkout -qb next
echo last >> README
"""


class Left(NamedTuple):
    """How both sides ended."""

    stopped: tuple[Answer, Answer]
    trees: dict[str, dict[bytes, tuple[str, int, bytes, int]]]
    git: dict[str, str]


@pytest.fixture(scope="module")
def left(pair: Pair) -> Left:
    """The end of both runs, after they have worked. Comes last: nothing lives behind it."""
    for answer in pair.both(*SCRIPT, WORK):
        assert answer.code == 0, answer
    first, second = (pair.call(side, "stop", pair.runs[side]) for side in SIDES)
    return Left((first, second), {side: pair.tree(side) for side in SIDES}, {side: _git(pair, side) for side in SIDES})


def _git(pair: Pair, side: str) -> str:
    script = "git status --porcelain; git log --format='%s %an'; git branch; git tag; git fsck; cat .git/config"
    done = subprocess.run(
        ["/bin/sh", "-c", script], cwd=pair.projects[side], env=pair.user.environment, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_the_work_that_is_left_is_the_same(left: Left) -> None:
    """Content, kinds, modes, links, holes, names of any bytes, times that were set; what was removed is gone."""
    first, second = (left.trees[side] for side in SIDES)

    assert {path: entry for path, entry in second.items() if first.get(path) != entry} == {}
    assert first.keys() == second.keys()
    assert first[b"timed"][3] == 1_234_567_890_500_000_000


def test_git_says_the_same_afterwards(left: Left) -> None:
    """Commits, branches, tags and the state of the work tree; also when git has tidied up."""
    assert left.git["namespace"] == left.git["microvm"]
    assert "work Dev" in left.git["microvm"]


def test_the_end_is_told_the_same(pair: Pair, left: Left) -> None:
    """`stop`, and once more; `exec` in what is over; the reason and exit code on record."""
    again = [pair.call(side, "stop", pair.runs[side]) for side in SIDES]
    late = [pair.exec(side, "true") for side in SIDES]
    ends = [(one["reason"], one["exit_code"], one["denied"]) for one in pair.user.receipts()[-2:]]

    # Whoever waits for more than a second is told so, by either side: how long that takes is no part of the answer.
    stopped = [one._replace(err=one.err.replace(b"cloister: waiting for RUN to end\n", b"")) for one in left.stopped]
    assert stopped[0] == stopped[1]
    assert again[0] == again[1]
    assert late[0] == late[1]
    assert ends[0] == ends[1]
    assert (late[0].code, again[0].code) == (125, 0)


# --- whole runs ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shell", "below", "words"),
    [
        ('umask 027; "$@"', "sub", ("/bin/sh", "-c", "umask; pwd; cat f; echo x > made; stat -c %a made")),
        ('"$@" | head -1; echo ${PIPESTATUS[0]}', "", ("/bin/sh", "-c", "cat README; exit 3")),
        ('"$@" <&-', "", ("/usr/bin/printf", "%s|", "\udcff", "", "ü")),
        ('"$@"', "", ("./data",)),
    ],
)  # fmt: skip
def test_whole_runs_are_the_same(
    image: Installs, tmp_path: Path, shell: str, below: str, words: tuple[str, ...]
) -> None:
    """The agent itself, from its caller's directory and with its caller's umask, as further commands."""
    pair = Pair(tmp_path, image)
    first, second = (pair.call(side, "run", side, "--", *words, shell=shell, below=below) for side in SIDES)
    trees = [pair.tree(side) for side in SIDES]
    pair.user.close()

    assert re.sub(rb"cloister: starting the broker\n", b"", first.err) == second.err
    assert first[:2] == second[:2]
    assert trees[0] == trees[1]
