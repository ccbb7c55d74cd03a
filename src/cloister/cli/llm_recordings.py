"""`cloister llm recordings`: the recorded model calls of a run, as a list, or one of them whole.

Everything in a recording came from an agent or a provider: it is cleaned before it reaches a terminal, and given
exactly with --json.
"""

from __future__ import annotations

import base64
import os
from typing import TYPE_CHECKING, Any

from cloister.cli import output, records
from cloister.errors import DeniedError, UsageError

if TYPE_CHECKING:
    from cloister.runs.recordings_read import Recorded, Recording


def show(subject: str, call: str, *, json: bool) -> int:
    """List a run's recorded calls, or print one.

    Raises:
        UsageError: no such run or call, or nothing was recorded.
        DeniedError: the recording was changed, or its key is missing; what opened before that was shown.
    """
    run = records.store().find(subject)
    recording, damage = _read(run, "")
    if call:
        one = _choose(recording, call)
        recording, damage = _read(run, one.call)
        one = recording.calls[one.call]
        if json:
            bodies = [{"what": what, **_exact(bytes(data))} for what, data in one.bodies]
            output.print_json({**_builtin(one), "bodies": bodies})
        else:
            _print_call(one)
    elif json:
        calls = [_builtin(one) for one in recording.calls.values()]
        output.print_json({"run": run, "closed": recording.closed, "damaged": damage is not None, "calls": calls})
    else:
        _print_list(recording, living=run in (records.living() or ()))
    if damage is not None:
        raise damage
    return 0


def _read(run: str, bodies_of: str) -> tuple[Recording, DeniedError | None]:
    """Return what opens of a recording, and why the rest does not."""
    from cloister.llm.recording import PURPOSE
    from cloister.runs.identity_store import DIRECTORY, IdentityStore
    from cloister.runs.recordings import FILE
    from cloister.runs.recordings_read import Recording, read_recording

    path = f"{os.path.dirname(records.store().events_path(run))}/{FILE}"
    if not os.path.lexists(path):
        raise UsageError(
            "recording-none", "no model calls of this run were recorded", where=run,
            remedy="llm = { record = true } in the agent's table, for runs to come",
        )  # fmt: skip
    seed = IdentityStore(f"{records.places().state}/{DIRECTORY}", os.environ).read().purposes.get(PURPOSE)
    if seed is None:
        raise DeniedError(
            "recording-key-missing", "the key store has no key for recordings", where=path,
            remedy="restore the identity directory it was made with",
        )  # fmt: skip
    recording = Recording()
    try:
        read_recording(path, run, seed.value, recording, bodies_of=bodies_of)
    except DeniedError as error:
        return recording, DeniedError(error.reference, error.message, where=path, remedy=error.remedy)
    return recording, None


def _choose(recording: Recording, call: str) -> Recorded:
    """Return the call that a number in the list, or the beginning of an id, means."""
    calls = list(recording.calls.values())
    if call.isdecimal() and 1 <= int(call) <= len(calls):
        return calls[int(call) - 1]
    found = [one for one in calls if one.call.startswith(call.upper())]
    if len(found) != 1:
        what = "no call" if not found else f"{len(found)} calls"
        raise UsageError("call-unknown", f"{what} with the number or id {call!r}", remedy="cloister llm recordings RUN")
    return found[0]


def _builtin(one: Recorded) -> dict[str, Any]:
    return {
        "id": one.call, "time": one.time, "model": one.model, "provider": one.provider, "route": one.route,
        "stream": one.stream, "status": one.status, "outcome": one.outcome, "whole": one.whole,
        "request_bytes": one.request_bytes, "request_kept": one.request_kept, "request_fields": one.request_fields,
        "answer_bytes": one.answer_bytes, "answer_kept": one.answer_kept, "answers": one.answers,
    }  # fmt: skip


def _exact(data: bytes) -> dict[str, str]:
    """Return a body for JSON, without loss."""
    try:
        return {"text": data.decode("utf-8")}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode("ascii")}


def _print_list(recording: Recording, *, living: bool) -> None:
    heads = ("", "TIME", "ROUTE", "MODEL", "PROVIDER", "STATUS", "SENT", "GOT", "OUTCOME")
    rows = []
    for number, one in enumerate(recording.calls.values(), 1):
        outcome = one.outcome or ("under way" if living else "its end is missing")
        cut = "" if one.whole or not one.outcome else ", not kept whole"
        rows.append((
            str(number), output.moment(one.time), one.route, output.clean(one.model), output.clean(one.provider),
            str(one.status or "-"), output.size(one.request_bytes), output.size(_got(one)), outcome + cut,
        ))  # fmt: skip
    print(output.table(heads, rows) if rows else "no call was recorded")
    if not recording.closed and not living:
        print("the recording has no end: its broker was killed, its disk was full, or it was cut")


def _print_call(one: Recorded) -> None:
    shown = [
        ("call", one.call), ("time", output.moment(one.time)), ("route", one.route),
        ("model", output.clean(one.model)), ("outcome", one.outcome or "its end is missing"),
    ]  # fmt: skip
    print(output.pairs(shown))
    answers = iter(one.answers)
    for what, data in one.bodies:
        title = f"request, {one.request_bytes} bytes, {one.request_kept} kept"
        if what == "answer":
            about = next(answers)
            provider, identity = output.clean(about["provider"]), output.clean(about["request_id"] or "none")
            title = f"answer {about['status']} of {provider}, request id {identity}, {len(data)} bytes kept"
        print(f"\n--- {title}")
        print(output.clean_lines(data.decode("utf-8", "backslashreplace")))


def _got(one: Recorded) -> int:
    return one.answer_bytes or sum(int(about["bytes"]) for about in one.answers)
