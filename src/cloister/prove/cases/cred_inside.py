"""Look everywhere for a real secret, a private key or somebody's token."""

import contextlib
import io
import os

from cloister.prove.inside.support import Box, CannotRunError

ID = "cred-inside"
TITLE = "Find a real secret in environments, files and memory"
PROMISE = "P-141"
CLASSES = (25, 34, 66)
EXPECT = "what could be read holds none of the agent's secrets, of the provider's keys, of our own keys"
FRESH = True
CHECKS = ("haul-holds-no-secret",)
IF_POLICY = ("credentials", "models", "identity")
LIMIT_S = 40.0

HAUL = "cloister-prove-haul"
MOST = 96 << 20
TOPS = ("/run", "/etc", "/tmp", "/dev/shm", "/var/tmp", "/var/lib", "/opt", "/srv")  # to look, not to use


def attack(box: Box) -> None:
    """Everything that can be read goes into a file of the workspace, which the host holds against the secrets."""
    if box.fact("unread_secrets"):
        raise CannotRunError(f"the host cannot look for {', '.join(box.fact('unread_secrets'))}")
    with open(box.path(HAUL), "wb", 0) as haul:
        for pid in sorted(name for name in os.listdir("/proc") if name.isdigit()):
            for name in ("environ", "cmdline", "auxv", "status"):
                with contextlib.suppress(OSError), open(f"/proc/{pid}/{name}", "rb") as file:
                    haul.write(file.read())
            _memory(pid, haul)
        for top in (*TOPS, box.home):
            for folder, _, names in os.walk(top):
                for name in names:
                    _file(f"{folder}/{name}", haul)
        size = haul.tell()
    box.stopped(f"{size >> 10} KiB collected")


def twin(box: Box) -> None:
    """The search finds what is there: the run's own id stands in it."""
    with open(box.path(HAUL), "rb") as file:
        box.works("the run's id was found", os.environ["CLOISTER_RUN"].encode() in file.read())


def _memory(pid: str, haul: io.FileIO) -> None:
    with contextlib.suppress(OSError, ValueError):
        with open(f"/proc/{pid}/maps") as maps:
            spans = [line.split()[:2] for line in maps if "[v" not in line]
        with open(f"/proc/{pid}/mem", "rb", 0) as memory:
            for span, modes in spans:
                first, last = (int(part, 16) for part in span.split("-"))
                if "w" in modes and last - first < 32 << 20 and haul.tell() < MOST:
                    with contextlib.suppress(OSError):
                        memory.seek(first)
                        haul.write(memory.read(last - first))


def _file(path: str, haul: io.FileIO) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            haul.write(f"\n{path}\n".encode("utf-8", "surrogateescape"))
            if haul.tell() < MOST:
                haul.write(os.read(descriptor, 2 << 20))
        finally:
            os.close(descriptor)
