"""The driver: one process in the sandbox that forks a child per case and reports each as a line of JSON.

Protocol, one JSON object per line. In: `{"id", "source", "function", "twin", "facts", "limit_s"}`.
Out: `{"id", "outcome", "detail", "twin"}`; outcome is `denied`, `allowed`, `cannot-run` or
`error`, twin is `ok`, `none` or what broke. The host sends the next case after the answer,
so that it can look at its canaries in between. Standard output belongs to the protocol: a
case's own output is collected and reported as part of the detail.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
import traceback
import types
from typing import Any

MAX_DETAIL = 4000


def install(name: str, source: str) -> None:
    """Make the support text importable under the name by which cases know it."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        if depth < len(parts) and ".".join(parts[:depth]) in sys.modules:
            continue
        module = types.ModuleType(".".join(parts[:depth]))
        module.__path__ = []
        sys.modules[module.__name__] = module
    # The code is what the host sent; it is compiled here because the sandbox has no copy of the package.
    exec(compile(source, name, "exec"), sys.modules[name].__dict__)  # noqa: S102


def install_all(texts: dict[str, str]) -> None:
    """Install modules by their short names, in order."""
    for name, text in texts.items():
        install(f"cloister.prove.inside.{name}", text)


def judge(request: dict[str, Any]) -> dict[str, Any]:
    """Run one case in this process; return its answer."""
    from cloister.prove.inside.support import Box, CannotRunError

    box = Box(request["facts"])
    answer: dict[str, Any] = {"id": request["id"], "twin": "none"}
    try:
        namespace: dict[str, Any] = {"__name__": "case"}
        exec(compile(request["source"], request["id"], "exec"), namespace)  # noqa: S102  # the same
        namespace[request["function"]](box)
        answer |= outcome(box.breaches, box.stops, box.surprises)
        if request["twin"] and "twin" in namespace:
            twin_box = Box(request["facts"])
            answer["twin"] = try_twin(namespace["twin"], twin_box)
            answer["detail"] = "; ".join([answer["detail"], *twin_box.stops])  # what a twin could not try
    except CannotRunError as error:
        answer |= unfinished(box.breaches, "cannot-run", str(error))
    except BaseException:  # noqa: BLE001  # a case that fails in an unforeseen way has proved nothing
        answer |= unfinished(box.breaches, "error", traceback.format_exc()[-1500:])
    answer["detail"] = answer["detail"][:MAX_DETAIL]
    return answer


def outcome(breaches: list[str], stops: list[str], surprises: list[str]) -> dict[str, str]:
    """Weigh the attempts of one case: one breach is a breach, one surprise is no pass, no attempt is no pass."""
    if breaches:
        return {"outcome": "allowed", "detail": "; ".join(breaches)}
    if surprises:
        return {"outcome": "error", "detail": "; ".join(surprises)}
    if not stops:
        return {"outcome": "error", "detail": "the case tried nothing"}
    return {"outcome": "denied", "detail": "; ".join(dict.fromkeys(stops))}


def unfinished(breaches: list[str], why: str, detail: str) -> dict[str, str]:
    """Return the outcome of a case that broke off: what had got through until then has got through."""
    return {"outcome": "allowed" if breaches else why, "detail": "; ".join([*breaches, detail])}


def try_twin(twin: Any, box: Any) -> str:
    """Run the legitimate neighbour of an attack: it must work."""
    try:
        twin(box)
    except BaseException as error:  # noqa: BLE001  # whatever broke, it is the finding
        return f"{type(error).__name__}: {error}"[:500]
    return "ok"


def child(request: dict[str, Any], result: int, output: int) -> None:
    """Become the case."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, null), (1, output), (2, output)):
        os.dup2(source, target)
    answer = judge(request)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os.write(result, json.dumps(answer).encode()[:60000])


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Fork, wait with a limit, end what is left of the case's group."""
    result, result_end = os.pipe()
    output, output_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            child(request, result_end, output_end)
        os._exit(0)
    os.close(result_end)
    os.close(output_end)
    answer, printed = collect((result, output), request["limit_s"])
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        decoded: dict[str, Any] = json.loads(answer)
    except ValueError:
        decoded = {
            "id": request["id"],
            "outcome": "error",
            "detail": "no answer within its time, or it died",
            "twin": "none",
        }
    if printed:
        decoded["printed"] = printed.decode("utf-8", "replace")
    return decoded


def collect(pipes: tuple[int, int], limit_s: float) -> tuple[bytes, bytes]:
    """Read both pipes until the answer is there or the time is over; a child of the case may keep its output open."""
    data = dict.fromkeys(pipes, b"")
    deadline = time.monotonic() + limit_s
    open_ones = list(pipes)
    while pipes[0] in open_ones and (left := deadline - time.monotonic()) > 0:
        for descriptor in select.select(open_ones, [], [], left)[0]:
            chunk = os.read(descriptor, 65536)
            data[descriptor] = (data[descriptor] + chunk)[:65536]
            if not chunk or (descriptor == pipes[0] and complete(data[descriptor])):
                open_ones.remove(descriptor)
    for descriptor in pipes:
        os.close(descriptor)
    return data[pipes[0]], data[pipes[1]]


def complete(data: bytes) -> bool:
    """Tell whether the answer is all there: a survivor of the case may hold the pipe open."""
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def serve() -> None:
    """Answer requests until the input ends."""
    for line in sys.stdin:
        sys.stdout.write(json.dumps(run(json.loads(line))) + "\n")
        sys.stdout.flush()


def begin(texts: dict[str, str]) -> None:
    """Say that the driver is up, then serve."""
    install_all({name: text for name, text in texts.items() if name != "driver"})
    sys.stdout.write(json.dumps({"id": "", "outcome": "ready", "pid": os.getpid()}) + "\n")
    sys.stdout.flush()
    serve()
