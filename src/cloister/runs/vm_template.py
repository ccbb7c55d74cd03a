"""What one run has to do with templates: starting from one, or leaving one for the next run."""

from __future__ import annotations

import functools
import os
import sys
from typing import TYPE_CHECKING

from cloister.host import vm_snapshot, vm_template
from cloister.host.vm_template import Held, Holder
from cloister.runs import vm_warm
from cloister.runs.vm_image import IMAGE, open_verified
from cloister.runs.vm_shape import numbers

if TYPE_CHECKING:
    from cloister.plan.vm import VmLaunch
    from cloister.runs.paths import Paths
    from cloister.runs.prepare import Prepared

HOLDER = Holder()
"""Of this process: templates are hashed once."""


class TemplateOf:
    """The template of one run's machine. Whoever made it calls `release` in the end."""

    def __init__(self, paths: Paths, prepared: Prepared) -> None:
        """Open nothing."""
        vm = prepared.plan.launch.vm
        assert vm is not None  # noqa: S101  # only such runs come here
        self._vm: VmLaunch = vm
        self._paths, self._host, self._images = paths, prepared.host, prepared.policy.images
        self._wanted = prepared.agent.microvm.warm
        self._held: Held | None = None
        self._peer = -1
        self._came_up = False

    def hold(self) -> None:
        """Verify the template that the plan names, and keep hold of it. May take as long as hashing it does.

        Raises:
            StepError: it is not what it was.
        """
        _tidy_once(self._paths.templates, self._paths.snapshots)
        memory = next((file.path for file in self._vm.files if file.role == "memory"), "")
        if memory:
            self._held = HOLDER.hold(os.path.dirname(memory), self._vm.template)

    def descriptors(self) -> list[int]:
        """Return memory, state and QEMU's orders for the monitor, the caller's; none for a machine that boots."""
        if self._held is None:
            return []
        if self._vm.monitor == "firecracker":
            return [os.dup(self._held.memory), self._held.state()]
        orders, self._peer = self._held.orders(numbers()["state"])
        return [os.dup(self._held.memory), self._held.state(), orders]

    def release(self) -> None:
        """The monitor is over, or never was."""
        if self._peer >= 0:
            os.close(self._peer)
            self._peer = -1
        if self._held is not None:
            HOLDER.release(self._held)
            self._held = None

    def came_up(self) -> None:
        """The guest has said hello: its image boots here."""
        self._came_up = True

    def make_later(self) -> None:
        """Make a template for the next such run beside everything else, where this one had to boot. Returns at once."""
        if not self._wanted or self._vm.template or not self._came_up:
            return
        root, wanted = self._paths.templates, vm_warm.wanted_of(self._vm)
        if vm_warm.find(root, wanted) is None:
            BACKGROUND.begin(str(wanted), self._make)

    def _make(self) -> None:
        root, wanted = self._paths.templates, vm_warm.wanted_of(self._vm)
        vm_warm.make(root, wanted, vm_warm.place_of(self._host), self._opened, quietly=True)

    def _opened(self) -> dict[str, int]:
        return dict(zip(IMAGE, open_verified(self._paths, self._images, self._vm, os.getuid()), strict=True))


@functools.cache
def _tidy_once(templates: str, snapshots: str) -> None:
    """Remove what makers that were killed have left: before the first machine of this process."""
    vm_template.tidy(templates)
    vm_snapshot.tidy(snapshots)


def _say(line: str) -> None:
    sys.stderr.write(f"cloister: no template was made: {line}\n")


BACKGROUND = vm_warm.Background(_say)
"""Of this process: one template at a time."""
