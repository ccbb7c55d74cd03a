"""What a daemon does with a bug: it is written down, and the daemon lives on."""

from __future__ import annotations

import asyncio
import sys
import time
import traceback


def log_exception(loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    """Write it to standard error, which is a log or the journal (`loop.set_exception_handler`)."""
    del loop
    error = context.get("exception")
    sys.stderr.write(f"{time.strftime('%FT%TZ', time.gmtime())} {context.get('message')}\n")
    if isinstance(error, BaseException):
        traceback.print_exception(error)
    sys.stderr.flush()


def log_bug() -> None:
    """Write the exception that is being handled to standard error: one request failed, the others go on."""
    traceback.print_exc()
    sys.stderr.flush()
