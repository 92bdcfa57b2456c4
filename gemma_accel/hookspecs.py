"""The plugin contract: three hooks and the patch they speak of.

A plugin is any module or object whose functions carry `@gemma_accel.hookimpl`. The package's own
modalities (text, vision, audio) are such plugins; others register under the entry-point group
``gemma_accel`` and are found by their installation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import nn

    from gemma_accel.report import Report

__all__ = ["Patch", "Undo", "hookimpl", "hookspec"]

hookspec = pluggy.HookspecMarker("gemma_accel")
hookimpl = pluggy.HookimplMarker("gemma_accel")

Undo = Callable[[], None]


class Patch:
    """Joins one seam of a model to what goes there.

    Subclass it, give it a name, and answer four questions. A patch holds no state of the model it
    is installed in: whatever has to be remembered lives in the closure that `install` returns.
    """

    name: str = ""
    """What the user calls it: in `apply(patches=[...])`, in the report. Unique among all plugins.
    """

    modality: str = "text"
    """text, vision, audio, or a plugin's own."""

    seam: str = "class"
    """What of the module it occupies: ``"class"`` for its `__class__`, otherwise the name of the
    attribute it sets. Two patches on the same seam of the same module are a `PatchConflictError`.
    """

    replaces: tuple[str, ...] = ()
    """Names of patches it stands in for: those are then not installed anywhere."""

    def matches(self, path: str, module: nn.Module) -> bool:
        """Whether ``module``, at dotted ``path``, is a place for this patch. Must be quick: it sees
        every module.
        """
        raise NotImplementedError

    def why_not(self, module: nn.Module) -> str | None:
        """The reason, as a sentence for the user, why this module must stay stock; None where the
        patch fits.
        """
        return None

    def needs(self, module: nn.Module) -> str | None:
        """The name of another patch that must sit in the same module for this one to act; None if
        it stands alone.
        """
        return None

    def install(self, module: nn.Module) -> Undo:
        """Change the module and return the function that changes it back. Raising leaves the module
        as it was.
        """
        raise NotImplementedError


@hookspec
def gemma_accel_patches() -> Iterable[Patch]:
    """The patches that a plugin offers, each naming its modality, in the order in which they are to
    be installed.
    """
    return ()


@hookspec(firstresult=True)
def gemma_accel_select(patch: Patch, path: str, module: nn.Module) -> bool | None:
    """False leaves this module stock, True takes the patch, None leaves the question to the next
    plugin.
    """


@hookspec
def gemma_accel_applied(model: nn.Module, report: Report) -> Any:
    """Called once `apply` is through, to observe and to log. What it returns is ignored."""
