"""A real kernel obeys the filter: every refused call gives its error, and what agents need still works."""

from __future__ import annotations

import errno
import json
import platform
import re
import shutil
import subprocess
from pathlib import Path

import bubblewrapped
import pytest

from cloister.isolation import seccomp
from cloister.isolation.seccomp_narrow import lists
from cloister.isolation.seccomp_table import table

pytestmark = pytest.mark.kernel

ARCH = platform.machine()
NUMBERS = table().machines[ARCH].numbers
HIGH = 1 << 32
NEWUSER, NEWNS, NEWTIME, SIGCHLD, THREADLIKE = 0x10000000, 0x20000, 0x80, 17, 0x400
ALWAYS = {r.syscall: r.errno for g in table().groups for r in g.rules if not r.when and r.syscall in NUMBERS}
# Calls decided by argument: name, arguments, the error they must give.
BY_ARGUMENT = [
    ("clone", [NEWUSER | SIGCHLD], "EPERM"),
    ("clone", [NEWNS | SIGCHLD | HIGH], "EPERM"),
    ("unshare", [NEWUSER], "EPERM"),
    ("unshare", [NEWTIME], "EPERM"),
    ("personality", [0x40000], "EPERM"),
    ("personality", [0x400000], "EPERM"),
    ("personality", [8 | HIGH], "EPERM"),
    ("prctl", [35, 1, 0, 0, 0], "EPERM"),
    ("move_pages", [1, 0, 0, 0, 0, 0], "EPERM"),
    ("migrate_pages", [1, 0, 0, 0], "EPERM"),
    ("seccomp", [1, 8, 0], "EPERM"),
    ("seccomp", [1 | HIGH, 8 | HIGH, 0], "EPERM"),
    ("socketpair", [30, 1, 0, 0], "EAFNOSUPPORT"),
    *[("socket", [family, 3, 0], "EAFNOSUPPORT") for family in (3, 4, 15, 17, 21, 29, 30, 31, 33, 38, 40, 43, 44, 45)],
    ("socket", [40 | HIGH, 1, 0], "EAFNOSUPPORT"),
    *[("socket", [16, 3, protocol], "EPROTONOSUPPORT") for protocol in (4, 6, 9, 12, 15, 16, 20)],
    *[("socket", [family, 3 | flags, 1], "ESOCKTNOSUPPORT") for family in (2, 10) for flags in (0, 0x80000, 0x80800)],
    *[("socket", [2, 1, protocol], "EPROTONOSUPPORT") for protocol in (132, 136, 256, 262, 6 | 256)],
    ("socket", [2, 6, 33], "ESOCKTNOSUPPORT"),
    *[("setsockopt", [0, 0, option, 0, 0], "EPERM") for option in (64, 65, 96, 128, 64 | HIGH)],
    ("setsockopt", [0, 41, 64, 0, 0], "EPERM"),
]
# What the same doors must let through.
WORKS = [
    ("unshare", [THREADLIKE]),
    ("personality", [0]),
    ("personality", [0xFFFFFFFF]),
    ("prctl", [4, 1, 0, 0, 0]),
    ("move_pages", [0, 0, 0, 0, 0, 0]),
    ("seccomp", [2, 0, 0]),
    ("socket", [1, 1, 0]),
    ("socket", [1, 5 | 0x80800, 0]),
    ("socket", [2, 1, 6]),
    ("socket", [2, 2 | 0x80000, 17]),
    ("socket", [10, 1 | 0x80800, 0]),
    ("socket", [16, 3 | 0x80000, 0]),
    ("setsockopt", [0, 41, 67, 0, 0]),
    (444, [0, 0, 1]),
    (434, [1, 0]),
    (436, [90, 99, 0]),
    (437, [0, 0, 0, 24]),
]
# Refusals that a bare kernel would not make: proof that it is the filter that answers.
OURS_ALONE = {"clone3", "add_key", "keyctl", "ptrace", "kcmp", "name_to_handle_at", "process_vm_readv"}

# Runs inside: reads [[number, [arguments]], …], answers the error of each (0: it worked).
PROBE = """
import ctypes, json, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
answers = []
for number, arguments in json.load(sys.stdin):
    ctypes.set_errno(0)
    result = libc.syscall(*[ctypes.c_ulong(each) for each in (number, *arguments, 0, 0, 0, 0, 0, 0)[:7]])
    if number == CLONE and result == 0:
        libc._exit(0)
    answers.append(ctypes.get_errno() if result == -1 else 0)
print(json.dumps(answers))
"""


def probe(calls, *, program=None, **lifts):
    """Return the error name of each (name or number, arguments) in a sandbox with our filter; `OK` if it worked."""
    wanted = [[NUMBERS.get(name, name), arguments] for name, arguments in calls]
    script = PROBE.replace("CLONE", str(NUMBERS["clone"]))
    filter_bytes = seccomp.assemble(ARCH, **lifts) if program is None else program or None
    done = bubblewrapped.run(["/usr/bin/python3", "-I", "-c", script], program=filter_bytes, stdin=json.dumps(wanted))
    assert done.returncode == 0, done.stderr
    return [errno.errorcode.get(number, str(number)) if number else "OK" for number in json.loads(done.stdout)]


def test_every_refused_call_gives_its_error():
    """Each call the table refuses outright is refused by the kernel, with the error of the table."""
    names = list(ALWAYS)
    assert dict(zip(names, probe([(name, []) for name in names]), strict=True)) == ALWAYS


def test_it_is_the_filter_that_refuses():
    """Without the filter the same sandbox answers otherwise: the test above can fail."""
    answers = probe([(name, []) for name in OURS_ALONE], program=b"")
    assert [pair for pair in zip(OURS_ALONE, answers, strict=True) if pair[1] == ALWAYS[pair[0]]] == []


def test_refusals_by_argument():
    """Namespaces, families, protocols, domains and listeners are refused, high bits of the argument set or not."""
    answers = probe([(name, arguments) for name, arguments, _ in BY_ARGUMENT])
    wrong = [(case, got) for case, got in zip(BY_ARGUMENT, answers, strict=True) if case[2] != got]
    assert wrong == []


def test_the_same_doors_let_through_what_is_needed():
    """Positive twin: the arguments programs really use are not refused."""
    answers = probe(WORKS)
    filtered = {"EPERM", "ENOSYS", "EAFNOSUPPORT", "EPROTONOSUPPORT", "ESOCKTNOSUPPORT"}
    assert [(case, got) for case, got in zip(WORKS, answers, strict=True) if got in filtered] == []


def test_numbers_are_those_of_the_kernel_headers():
    """Each number of the table that the installed headers know is the same there, for both tables of numbers."""
    headers = {
        "x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h",
        "aarch64": "/usr/include/asm-generic/unistd.h",
    }
    compared = 0
    for arch, path in headers.items():
        if not Path(path).exists():
            continue
        text = Path(path).read_text(encoding="ascii")
        known = {name: int(nr) for name, nr in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
        column = 0 if arch == "x86_64" else 1
        narrow = {name: both[column] for name, both in lists().numbers.items() if both[column] >= 0}
        for name, number in (*table().machines[arch].numbers.items(), *narrow.items()):
            if name in known:
                compared += 1
                assert number == known[name], name
        absent = known.keys() & {name for group in table().groups for rule in group.rules for name in [rule.syscall]}
        assert absent <= table().machines[arch].numbers.keys()
    if not compared:
        pytest.skip("no kernel headers are installed")


def test_unknown_numbers_do_not_exist():
    """A number beyond the table answers ENOSYS, in the gaps and above the highest."""
    assert set(probe([(number, []) for number in (337, 400, 423, 470, 480, 511, 600, 4096)])) == {"ENOSYS"}


def test_lifts_reach_the_kernel():
    """`nested` opens user namespaces, `ptrace` tracing, and `netlink = false` closes what was open."""
    calls = [("unshare", [NEWUSER]), ("kcmp", [1, 1, 0, 0, 0]), ("socket", [16, 3, 0]), ("keyctl", [])]
    assert probe(calls) == ["EPERM", "EPERM", "OK", "EPERM"]
    assert probe(calls, nested=True) == ["OK", "EPERM", "OK", "EPERM"]
    assert probe(calls, ptrace=True) == ["EPERM", "OK", "OK", "EPERM"]
    assert probe(calls, netlink=False) == ["EPERM", "EPERM", "EAFNOSUPPORT", "EPERM"]


def test_terminal_injection_is_refused_high_bits_too():
    """TIOCSTI and friends fail on the process's own terminal in every spelling; asking for the size works."""
    script = """
import ctypes, os, pty
libc = ctypes.CDLL(None, use_errno=True)
os.setsid()
_, slave = pty.openpty()
def call(request, argument):
    ctypes.set_errno(0)
    libc.syscall(ctypes.c_long(NUMBER), ctypes.c_long(slave), ctypes.c_ulong(request), argument)
    return ctypes.get_errno()
print(call(0x540E, 0), call(0x5413, ctypes.create_string_buffer(8)))
print([call(r | h << 32, ctypes.create_string_buffer(b"i")) for r in (0x5412, 0x541C, 0x5423) for h in (0, 1, 1 << 31)])
"""
    done = bubblewrapped.run(
        ["/usr/bin/python3", "-I", "-c", script.replace("NUMBER", str(NUMBERS["ioctl"]))],
        program=seccomp.assemble(ARCH),
    )
    assert done.stdout.splitlines() == ["0 0", str([1] * 9)], done.stderr


@pytest.mark.skipif(ARCH != "x86_64", reason="int 0x80 and x32 exist on x86_64 only")
def test_foreign_abis_are_refused(tmp_path):
    """Getpid through int 0x80 and through the x32 bit gives EPERM; through syscall it works."""
    source = tmp_path / "abi.c"
    source.write_text("""
        #include <stdio.h>
        #include <unistd.h>
        #include <errno.h>
        int main(void) {
            long compat;
            __asm__ volatile("int $0x80" : "=a"(compat) : "a"(20) : "memory");
            long x32 = syscall(0x40000000 | 39);
            printf("%ld %d %d\\n", compat, x32 == -1 ? errno : 0, syscall(39) > 0);
            return 0;
        }""")
    subprocess.run(["cc", "-O0", "-o", tmp_path / "abi", source], check=True)
    binary = (tmp_path / "abi").read_bytes()
    refused = bubblewrapped.run(["/tmp/abi"], program=seccomp.assemble(ARCH), files={"abi": binary})
    assert refused.stdout == "-1 1 1\n", refused.stderr
    bare = bubblewrapped.run(["/tmp/abi"], files={"abi": binary})
    if bare.stdout.startswith("-38 "):
        pytest.skip("this kernel has no 32-bit ABI at all")
    assert int(bare.stdout.split()[0]) > 0


def test_an_added_plain_filter_is_allowed():
    """A program may sandbox itself further: Chromium, Codex and systemd do."""
    script = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
class Prog(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_char_p)]
prog = Prog(1, (0x7fff000000000006).to_bytes(8, "little"))
print(libc.prctl(38, 1, 0, 0, 0), libc.syscall(NUMBER, 1, 0, ctypes.byref(prog)))
"""
    script = script.replace("NUMBER", str(NUMBERS["seccomp"]))
    done = bubblewrapped.run(["/usr/bin/python3", "-I", "-c", script], program=seccomp.assemble(ARCH))
    assert done.stdout == "0 0\n", done.stderr


PROGRAMS = {
    "python threads and processes": [
        "python3",
        "-I",
        "-c",
        (
            "import threading as t, subprocess as s; x = t.Thread(target=print); x.start(); x.join(); "
            "s.run(['true'], check=True); s.run('true', shell=True, check=True)"
        ),
    ],
    "node workers, children and interfaces": [
        "node",
        "-e",
        (
            "const {Worker} = require('worker_threads'); new Worker('0', {eval: true}).on('exit', () => {"
            "require('os').networkInterfaces(); require('child_process').execFileSync('true');"
            "require('fs').promises.readFile('/etc/hostname').then(() => process.exit(0), () => process.exit(3)) })"
        ),
    ],
    "git": [
        "sh",
        "-ec",
        "git init -q r; cd r; echo a > a; git add a; git -c user.name=a -c user.email=a@b commit -qm a; git gc -q",
    ],
    "a compiler": ["sh", "-ec", "echo 'int main(void) { return 0; }' > a.c; cc -o a a.c; ./a"],
    "loopback": [
        "python3",
        "-I",
        "-c",
        (
            "import socket as s; l = s.create_server(('127.0.0.1', 0)); s.create_connection(l.getsockname()).close();"
            "s.socketpair(); s.getaddrinfo('localhost', 80)"
        ),
    ],
    "java": ["java", "-Xshare:auto", "-version"],
}


@pytest.mark.parametrize("what", PROGRAMS)
@pytest.mark.parametrize("nested", [False, True])
def test_programs_agents_need_run_under_the_filter(what, nested):
    """Runtimes fall back where they must (clone3, io_uring, MPTCP) and work."""
    argv = PROGRAMS[what]
    if shutil.which(argv[0]) is None:
        pytest.skip(f"{argv[0]} is not installed")
    done = bubblewrapped.run(argv, program=seccomp.assemble(ARCH, nested=nested))
    assert done.returncode == 0, done.stderr


def test_nested_runs_an_inner_bubblewrap():
    """`nested = true` is enough for an agent's own bubblewrap, and without it that fails."""
    inner = ["bwrap", "--unshare-user", "--unshare-pid", "--ro-bind", "/", "/", "true"]
    assert bubblewrapped.run(inner, program=seccomp.assemble(ARCH, nested=True)).returncode == 0
    assert bubblewrapped.run(inner, program=seccomp.assemble(ARCH)).returncode != 0


@pytest.mark.parametrize("argv", [["strace", "-f", "true"], ["gdb", "-batch", "-ex", "run", "/usr/bin/true"]])
def test_ptrace_runs_a_debugger(argv):
    """`ptrace = true` is enough for strace and gdb, and without it they cannot trace."""
    if shutil.which(argv[0]) is None:
        pytest.skip(f"{argv[0]} is not installed")
    traced = bubblewrapped.run(argv, program=seccomp.assemble(ARCH, ptrace=True))
    assert "not permitted" not in traced.stdout + traced.stderr
    assert "exited" in traced.stdout + traced.stderr
    refused = bubblewrapped.run(argv, program=seccomp.assemble(ARCH))
    assert "not permitted" in refused.stdout + refused.stderr
