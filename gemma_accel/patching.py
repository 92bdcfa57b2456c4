"""apply(): ask the hooks, walk the model, install, report. All or nothing.

The one room with all the keys: nothing else in the package knows both the patches and the machinery
they hang in.
"""

from __future__ import annotations

import functools
import importlib.metadata
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from gemma_accel import fingerprints, wiring
from gemma_accel.budget import memory_budget
from gemma_accel.errors import (
    ForeignPatchError,
    GemmaAccelError,
    PatchConflictError,
    PatchError,
    SkippedPatchError,
    UnsupportedModelError,
)
from gemma_accel.hookspecs import Patch, Undo
from gemma_accel.models import base_model, model_device
from gemma_accel.registry import Registry
from gemma_accel.report import Applied, Report

__all__ = ["apply", "registry", "report_of"]

_REPORT = "_gemma_accel_report"  # on the model itself, so that the two are collected together


@functools.cache
def registry() -> Registry:
    """The process's registry: the built-in modalities and the installed plugins, made when first
    asked for.
    """
    from gemma_accel.patches import audio, text, vision

    return Registry({"text": text, "vision": vision, "audio": audio})


def report_of(model: Any) -> Report | None:
    """The report of an applied model (PEFT's wrapper or the model inside), None for any other."""
    try:
        return vars(base_model(model)).get(_REPORT)
    except GemmaAccelError:
        return None


def apply(
    model: Any,
    *,
    vram_gib: float | None = None,
    patches: Iterable[str] | None = None,
    strict: bool = False,
) -> Report:
    """Patch a Gemma 4 model in place, so that a stock trainer runs it faster and in less memory,
    with the same gradients.

    Args:
        model: a `Gemma4ForConditionalGeneration` or `Gemma4ForCausalLM`, or a `PeftModel` around
            one. Its linear layers may be quantised to NF4 (bitsandbytes); PEFT may wrap it before
            or after.
        vram_gib: the GPU memory to live in, in GiB; the allocator is then held to it. Default: what
            the device has free plus what the model holds, or the allocator's own cap
            (`torch.cuda.set_per_process_memory_fraction`) where that is less.
        patches: names of the patches to install; default all.
        strict: raise instead of leaving a module stock on a CUDA device.

    Returns:
        A `Report`: what was applied, what was skipped and why; `print` it. Applying twice gives the
        same report again.

    Raises:
        UnsupportedModelError: not a Gemma 4 model.
        ForeignPatchError: Liger, Unsloth or accelerate's offloading already changed the model.
        PatchConflictError: two plugins want the same seam.
        PluginError, PatchError: a plugin's hook, or a patch's install, raised.
        BudgetError: ``vram_gib`` is less than the model's weights alone need.
        SkippedPatchError: with ``strict``.
        ValueError: ``patches`` names one that nobody offers.

    Whatever is raised, the model is as it was before the call.
    """
    base = base_model(model)
    if (report := report_of(base)) is not None:
        if vram_gib is not None:
            wiring.live_in(base, report, memory_budget(base, vram_gib), capped=True)
        return report
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModelError(
            "gemma_accel.apply got a model that torch.compile has wrapped. Apply it to the model "
            "before, or let the trainer compile it: TrainingArguments(torch_compile=True)."
        )
    _refuse_foreign(base)
    budget = memory_budget(base, vram_gib)
    chosen = _choose(registry().patches(), patches)
    report = Report(versions=_versions())
    candidates = _candidates(base, chosen, report)
    if strict and model_device(base).type == "cuda":
        _refuse_skips(report)
    try:
        _install(candidates, report)
        wiring.on_applied(model, base, report, budget, capped=vram_gib is not None)
        setattr(base, _REPORT, report)
        report._undos.insert(0, functools.partial(delattr, base, _REPORT))
        registry().applied(model, report)
    except BaseException:
        _roll_back(report)
        raise
    return report


def _choose(offered: list[Patch], names: Iterable[str] | None) -> list[Patch]:
    if names is None:
        return offered
    wanted = [names] if isinstance(names, str) else list(names)
    known = {patch.name for patch in offered}
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(
            f"apply(patches=...): nobody offers {', '.join(map(repr, unknown))}. "
            f"There are: {', '.join(sorted(known))}."
        )
    return [patch for patch in offered if patch.name in wanted]


def _candidates(
    base: nn.Module, patches: list[Patch], report: Report
) -> list[tuple[Patch, str, nn.Module]]:
    """Where each patch fits, in the patches' order; what does not fit, or was written for other
    source than what is installed, goes to the report with its reason.
    """
    found = []
    taken: dict[tuple[str, str], str] = {}
    placed: set[tuple[str, str]] = set()
    modules = list(base.named_modules())
    for patch in patches:
        matched = False
        changed = fingerprints.why_not(patch.name)
        for path, module in modules:
            if not patch.matches(path, module):
                continue
            matched = True
            if not registry().selects(patch, path, module):
                report.skip(patch.name, patch.modality, path, "a plugin deselected it")
                continue
            if reason := changed or _refusal(patch, path, module):
                report.skip(patch.name, patch.modality, path, reason)
                continue
            if (needed := patch.needs(module)) and (path, needed) not in placed:
                report.skip(patch.name, patch.modality, path, f"it needs the {needed!r} patch here")
                continue
            if other := taken.get((path, patch.seam)):
                raise PatchConflictError(
                    f"patches {other!r} and {patch.name!r} both want the {patch.seam!r} of "
                    f"{path or 'the model'!r} "
                    f"({type(module).__name__}). Let one deselect that module "
                    "(gemma_accel_select) or name the other in "
                    "`replaces`. The model is as it was."
                )
            taken[path, patch.seam] = patch.name
            placed.add((path, patch.name))
            found.append((patch, path, module))
        if not matched:
            report.skip(patch.name, patch.modality, "", "nothing in this model matches it")
    return found


def _refusal(patch: Patch, path: str, module: nn.Module) -> str | None:
    try:
        return patch.why_not(module)
    except Exception as error:
        raise PatchError(
            f"patch {patch.name!r} could not tell whether it fits {path or 'the model'!r}: "
            f"{type(error).__name__}: {error}. The model is as it was. Is its config whole? If so, "
            "leave the patch out with apply(patches=[...]) and report this."
        ) from error


def _install(candidates: list[tuple[Patch, str, nn.Module]], report: Report) -> None:
    for patch, path, module in candidates:
        try:
            undo: Undo = patch.install(module)
        except Exception as error:
            raise PatchError(
                f"patch {patch.name!r} failed at {path or 'the model'!r}: {type(error).__name__}: "
                f"{error}. "
                "The model is stock again. Leave the patch out with apply(patches=[...]) and "
                "report this."
            ) from error
        if not callable(undo):
            raise PatchError(
                f"patch {patch.name!r} returned {undo!r} from install at {path!r} instead of its "
                "undo. A patch must "
                "return the function that changes the module back."
            )
        report._undos.append(undo)
        if obstacle := getattr(undo, "obstacle", None):
            report._checks.append(_at(path, obstacle))
        report.applied.append(Applied(patch.name, patch.modality, path))


def _at(path: str, obstacle: Any) -> Any:
    return lambda: f"{path}: {reason}" if (reason := obstacle()) else None


def _roll_back(report: Report) -> None:
    while report._undos:
        report._undos.pop()()


def _refuse_foreign(base: nn.Module) -> None:
    """Patches of others do not mix with ours: refuse before anything is touched, naming who and
    where.
    """
    for path, module in base.named_modules():
        hook = getattr(module, "_hf_hook", None)
        if path and hook is not None:
            fits = ", and import gemma_accel.auto before, which makes it fit"
            raise ForeignPatchError(
                f"accelerate moves weights in and out at {path!r} ({type(hook).__name__}), as it "
                "does for a device_map that spans the CPU, the disk or several devices. Load the "
                "model on one device: device_map={'': 0}"
                f"{'' if 'gemma_accel.auto' in sys.modules else fits}."
            )
        forward = vars(module).get("forward")
        owner = getattr(forward, "__module__", None) or ""
        origin = owner if forward is not None else type(module).__module__
        for name in ("liger_kernel", "unsloth"):
            if origin.split(".")[0].startswith(name):
                raise ForeignPatchError(
                    f"{name} already patched this model (at {path or 'the model'!r}). Use one or "
                    "the other: load the model in a "
                    f"process that does not import {name}."
                )


def _refuse_skips(report: Report) -> None:
    if report.skipped:
        lines = {f"{r.patch} at {r.path or 'nowhere'}: {r.reason}" for r in report.skipped}
        raise SkippedPatchError(
            "apply(strict=True) would have left modules stock:\n  " + "\n  ".join(sorted(lines))
        )


def _versions() -> dict[str, str]:
    found = {}
    for name in (
        "gemma-accel",
        "torch",
        "triton",
        "transformers",
        "trl",
        "peft",
        "bitsandbytes",
        "accelerate",
    ):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found
