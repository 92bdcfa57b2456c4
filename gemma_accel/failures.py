"""What to tell a user of an error that comes out of a kernel: which, on what card, and what now."""

from __future__ import annotations

import traceback

import torch

from gemma_accel.report import Report

__all__ = ["kernel_failure"]

_KERNELS = "gemma_accel.kernels."

_PATCHES_OF = {
    "attention": ("attention",),
    "chunked_attention": ("audio_attention",),
    "clip": ("audio_", "vision_", "clipped_"),
    "clip_geglu": ("vision_mlp",),
    "clip_norm": ("audio_", "vision_"),
    "clip_norm_add": ("audio_", "vision_"),
    "clip_silu": ("audio_",),
    "geglu": ("geglu",),
    "light_conv": ("audio_light_conv",),
    "lora": ("lora", "audio_lora", "vision_lora"),
    "mlp": ("lora",),
    "nf4": ("lora", "audio_lora", "vision_lora"),
    "norm_add": ("decoder_layer",),
    "ple": ("per_layer_embeddings",),
    "qk_norm_rope": ("qk_norm_rope",),
    "rms_norm": ("rms_norm",),
    "segments": ("attention",),
    "vision_attention": ("vision_attention",),
    "vision_qkv": ("vision_attention",),
}
"""The patches that call a module of `gemma_accel.kernels`, each by its name or how names begin."""

_NOT_THE_KERNELS_FAULT = ("out of memory", "illegal memory access", "device-side assert")
"""In messages of errors that surface at a launch and come from elsewhere."""


def kernel_failure(error: Exception, report: Report | None) -> str | None:
    """What to tell the user of an error that a kernel's build or launch raised; None of any other.

    It is one if it was raised in something that a module of `gemma_accel.kernels` called, torch
    excepted: what those modules raise themselves says enough.
    """
    if any(text in str(error).lower() for text in _NOT_THE_KERNELS_FAULT):
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [frame.f_globals.get("__name__", "") for frame in frames]
    ours = [i for i, name in enumerate(names) if name.startswith(_KERNELS)]
    if not ours or ours[-1] == len(frames) - 1 or names[-1].split(".")[0] == "torch":
        return None
    op = names[ours[0]].removeprefix(_KERNELS)
    function = frames[ours[-1]].f_code.co_name
    device = "this machine's CPU"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        device = f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    return (
        f"kernel {function!r} of {names[ours[-1]]} failed on {device}: {type(error).__name__}: "
        f"{error}. No weight was changed in this step, and checkpoints are as they were saved. "
        f"{_without(op, report)} and report this with the output of `gemma-accel info`."
    )


def _without(op: str, report: Report | None) -> str:
    """How to train without the patches that ``op`` serves."""
    uses = _PATCHES_OF.get(op, (op,))
    applied = dict.fromkeys(record.patch for record in report.applied) if report else {}
    guilty = [name for name in applied if name.startswith(uses) or name in uses]
    rest = [name for name in applied if name not in guilty]
    named = " and ".join(map(repr, guilty or uses))
    return (
        f"Leave the patch {named} out: call gemma_accel.apply(model, patches={rest!r}) before "
        "the Trainer is built; resume from the last checkpoint"
    )
