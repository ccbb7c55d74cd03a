"""Shed the confinement by running a copy, a memory file, or through the loader."""

import os
import shutil
import subprocess

from cloister.prove.inside.support import Box, scratch, syscall

ID = "proc-exec-stays-confined"
TITLE = "Shed the confinement by running a copy, a memory file, or through the loader"
PROMISE = "P-039"
CLASSES = (31, 32, 33)
EXPECT = "running programs is free; the filter and the mounts are inherited by each"


def attack(box: Box) -> None:
    """Each way of running must show the same filter, and the same absence."""
    secret = str(box.fact("secret"))
    loader = next(
        (
            path
            for path in (
                "/lib64/ld-linux-x86-64.so.2",
                "/lib/ld-linux-aarch64.so.1",
                "/lib/ld-linux-riscv64-lp64d.so.1",
            )
            if os.path.exists(path)
        ),
        "",
    )
    memory = syscall("memfd_create", b"cat", 0)
    with open("/bin/cat", "rb") as source, os.fdopen(os.dup(memory), "wb") as target:
        shutil.copyfileobj(source, target)
    with scratch(box.path("cat")) as copy:
        shutil.copy("/bin/cat", copy)
        ways = {
            "a copy": [copy],
            "a memory file": [f"/proc/self/fd/{memory}"],
            "/proc/self/root": ["/proc/self/root/bin/cat"],
        }
        if loader:
            ways["the loader"] = [loader, "/bin/cat"]
        for name, words in ways.items():
            status = subprocess.run(
                [*words, "/proc/self/status"],
                capture_output=True,
                text=True,
                timeout=5,
                check=False,
                pass_fds=(memory,),
            )
            fields = dict(line.split(":\t", 1) for line in status.stdout.splitlines() if ":\t" in line)
            box.must(
                fields.get("Seccomp") == "2" and fields.get("NoNewPrivs") == "1",
                f"{name}: Seccomp {fields.get('Seccomp')}",
            )
            done = subprocess.run(
                [*words, secret], capture_output=True, text=True, timeout=5, check=False, pass_fds=(memory,)
            )
            box.must(done.returncode != 0, f"{name}: {done.stdout or 'the secret is not there'}")
