"""Taking a file or a directory off the disk of a machine that does not run: a confined child reads, we unpack.

The child gets the image and the end of a pipe (`vm_pack`); what comes out of the pipe is as little trusted as what a
living guest sends (`vm_copy`).
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import IO, TypeVar

from cloister.errors import CloisterError, DeniedError, UsageError
from cloister.host.disk_child import SILENCE_S, Watch, in_child
from cloister.host.e2fs import Tools
from cloister.host.vm_image import clean_disk

_Taken = TypeVar("_Taken")


def take_off(tools: Tools, image: str, name: bytes, take: Callable[[IO[bytes]], _Taken]) -> _Taken:
    """Have `take` read the tar of what is at the path `name` on the disk `image`; return what it returns.

    Raises:
        UsageError: there is no such file or directory; links on the way are not followed.
        DeniedError: the disk cannot be read.
        DiskToolError: it is unclean, and cannot be replayed.
        CloisterError: `take` has failed.
        OSError: the disk is not there, or there is no room for a copy.
    """
    watch = Watch()
    with clean_disk(tools, image) as disk:
        source, sink = os.pipe()
        order = {
            "filter": base64.b64encode(tools.filters.reader).decode(), "name": base64.b64encode(name).decode(),
        }  # fmt: skip
        with ThreadPoolExecutor(1) as pool:
            child = pool.submit(
                in_child, "pack", order, int, descriptors={"image": disk, "sink": sink}, watch=watch,
                silence_s=SILENCE_S, started=lambda: os.close(sink),
            )  # fmt: skip
            try:
                with open(source, "rb") as stream:
                    taken = take(stream)
                    while stream.read(1 << 16):
                        pass
                child.result()
            except CloisterError as error:
                failed = child.exception()
                raise (failed if isinstance(failed, (DeniedError, UsageError)) else error) from None
            finally:
                watch.cancel()
                os.close(disk)
    return taken
