"""Swap a directory for a symbolic link while a path through it is opened."""

import os
import shutil
import threading
import time

from cloister.prove.inside.support import Box, read

ID = "fs-symlink-swap"
TITLE = "Swap a directory for a symbolic link while a path through it is opened"
PROMISE = "P-025"
CLASSES = (2,)
EXPECT = "no order of events makes the host's file visible"
LIMIT_S = 15.0


def attack(box: Box) -> None:
    """Flip a name between a directory and a link for a second, and open through it all the time."""
    folder, name = os.path.split(str(box.fact("secret")))
    base = box.path("swap-attack")
    os.makedirs(f"{base}/real", exist_ok=True)
    with open(f"{base}/real/{name}", "w") as file:
        file.write("mine")
    os.symlink(folder, f"{base}/link")
    os.symlink("real", f"{base}/door")
    stop = threading.Event()
    flipper = threading.Thread(target=flip, args=(base, folder, stop))
    flipper.start()
    tries, leaks, end = 0, [], time.monotonic() + 1.0
    while time.monotonic() < end:
        tries += 1
        try:
            text = read(f"{base}/door/{name}")
        except OSError:
            continue
        if text not in ("mine", ""):
            leaks.append(text)
    stop.set()
    flipper.join()
    shutil.rmtree(base)
    box.must(not leaks, f"{tries} tries: {leaks[:1] or 'never'}")


def flip(base: str, folder: str, stop: threading.Event) -> None:
    """Replace the door by rename, so that it always exists."""
    while not stop.is_set():
        for target in ("real", folder):
            os.symlink(target, f"{base}/next")
            os.rename(f"{base}/next", f"{base}/door")
