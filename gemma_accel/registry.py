"""Who offers patches: the package's own modalities and every installed plugin, behind one pluggy
manager.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pluggy

from gemma_accel import hookspecs
from gemma_accel.errors import PatchConflictError, PluginError
from gemma_accel.hookspecs import Patch

__all__ = ["Registry"]


class Registry:
    """A plugin manager with the package's own modalities registered first, then the installed
    plugins.

    A plugin is blocked by name with ``PLUGGY_BLOCK``-like means of its own environment, or
    deselects modules by the `gemma_accel_select` hook; the registry itself has no switches.
    """

    def __init__(self, builtin: dict[str, Any], *, entry_points: bool = True) -> None:
        self.manager = pluggy.PluginManager("gemma_accel")
        self.manager.add_hookspecs(hookspecs)
        for name, plugin in builtin.items():
            self.manager.register(plugin, name=name)
        if entry_points:
            try:
                self.manager.load_setuptools_entrypoints("gemma_accel")
            except Exception as error:
                raise PluginError(
                    f"an installed gemma_accel plugin failed to import: {type(error).__name__}: "
                    f"{error}. "
                    "Uninstall or repair the distribution that declares the entry-point group "
                    "'gemma_accel'."
                ) from error
        try:
            # a misspelt hook is an error, not a plugin that silently does nothing
            self.manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(f"{error}. The hooks are listed in gemma_accel.hookspecs.") from error

    def register(self, plugin: Any, name: str | None = None) -> str | None:
        """Add a plugin to this registry by hand (a test's, a notebook's)."""
        return self.manager.register(plugin, name=name)

    def patches(self) -> list[Patch]:
        """Every patch on offer, in order: the package's own first, then plugins as they were
        registered.
        """
        found: list[tuple[str, Patch]] = []
        for name, offered in self._call_each("gemma_accel_patches"):
            for patch in offered or ():
                if not isinstance(patch, Patch) or not patch.name:
                    raise PluginError(
                        f"plugin {name!r}: gemma_accel_patches must give gemma_accel.Patch "
                        "objects that have a name, "
                        f"got {patch!r}. Subclass gemma_accel.Patch and set `name`."
                    )
                found.append((name, patch))
        replaced = {gone for _, patch in found for gone in patch.replaces}
        by_name: dict[str, str] = {}
        for plugin, patch in found:
            if patch.name in by_name and patch.name not in replaced:
                raise PatchConflictError(
                    f"plugins {by_name[patch.name]!r} and {plugin!r} both offer a patch named "
                    f"{patch.name!r}. Rename one, or let "
                    f"it say `replaces = ({patch.name!r},)` under another name."
                )
            by_name.setdefault(patch.name, plugin)
        return [patch for _, patch in found if patch.name not in replaced]

    def selects(self, patch: Patch, path: str, module: Any) -> bool:
        """Whether the plugins leave ``module`` to ``patch``: the first that answers decides,
        silence means yes.
        """
        for _, answer in self._call_each(
            "gemma_accel_select", patch=patch, path=path, module=module
        ):
            if answer is not None:
                return bool(answer)
        return True

    def applied(self, model: Any, report: Any) -> None:
        """Tell every plugin that `apply` is through."""
        for _ in self._call_each("gemma_accel_applied", model=model, report=report):
            pass

    def _call_each(self, hook: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """Each plugin's answer beside its name. pluggy's own call would lose the name of the one
        that raises.
        """
        # registration order: built-in modalities first; for `select`, plugins speak before the
        # built-ins
        implementations = list(getattr(self.manager.hook, hook).get_hookimpls())
        if hook == "gemma_accel_select":
            implementations.reverse()
        for implementation in implementations:
            accepted = {name: arguments[name] for name in implementation.argnames}
            try:
                answer = implementation.function(**accepted)
            except Exception as error:
                raise PluginError(
                    f"plugin {implementation.plugin_name!r} raised in {hook}: "
                    f"{type(error).__name__}: {error}. "
                    "The model is as it was; repair or uninstall the plugin."
                ) from error
            yield implementation.plugin_name, answer
