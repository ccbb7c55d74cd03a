"""The programs of this benchmark: the upstream and the load generator, built with cc, and the peers, found by path.

`tools/bench` installs the peers into environments of their own and says where by CLOISTER_BENCH_LITELLM and
CLOISTER_BENCH_MITMPROXY; what is not there is reported as missing, never made up.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-D_FORTIFY_SOURCE=2")


def built(name: str) -> str:
    """Return the program of `NAME.c`, compiled once per content into the user's cache.

    Raises:
        CalledProcessError: the compiler refuses.
    """
    source = HERE / f"{name}.c"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cloister-bench"
    target = cache / f"{name}-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(f".{os.getpid()}")
        subprocess.run(["cc", *FLAGS, str(source), "-o", str(fresh)], check=True)
        fresh.rename(target)
    return str(target)


def peer(name: str, program: str = "") -> str:
    """Return the path of a peer's program, empty when it is not installed."""
    folder = os.environ.get(f"CLOISTER_BENCH_{name.upper()}", "")
    path = Path(folder or "/nonexistent") / "bin" / (program or name)
    return str(path) if path.exists() else ""


def nginx() -> str:
    """Return nginx, which Debian keeps where ordinary users have no PATH to."""
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or ""


def versions() -> dict[str, Sequence[str]]:
    """Return the commands that print the versions of what is compared."""
    return {
        "nginx": ("sh", "-c", f"{nginx() or 'nginx'} -v 2>&1 | tr / ' '"),
        "LiteLLM": (peer("litellm", "python") or "litellm", "-c", _version("litellm")),
        "mitmproxy": (peer("mitmproxy", "python") or "mitmdump", "-c", _version("mitmproxy")),
        "aiohttp": ("python3", "-c", _version("aiohttp")),
        "uvloop": ("python3", "-c", _version("uvloop")),
    }


def _version(package: str) -> str:
    return f"import importlib.metadata as m; print(m.version({package!r}))"
