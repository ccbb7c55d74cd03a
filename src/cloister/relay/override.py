"""`@override` for Python 3.11: checked by mypy, nothing at run time. It goes when 3.12 is the oldest Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import override
else:

    def override(method):  # noqa: ANN001, ANN201 - typing_extensions has the types
        """Return the method as it is."""
        return method


__all__ = ["override"]
