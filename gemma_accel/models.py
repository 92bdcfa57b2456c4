"""Which models these are, and which parts of one the rest of the package speaks of."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextModel,
)

from gemma_accel.errors import UnsupportedModelError

__all__ = ["base_model", "is_gemma4", "model_device", "text_model"]

SUPPORTED = (Gemma4ForConditionalGeneration, Gemma4ForCausalLM)


def _unwrapped(model: Any) -> Any:
    """The model inside `torch.compile`'s and PEFT's wrappers, if it is in them."""
    model = getattr(model, "_orig_mod", model)
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) and hasattr(model, "peft_config") else model


def is_gemma4(model: Any) -> bool:
    return isinstance(_unwrapped(model), SUPPORTED)


def base_model(model: Any) -> nn.Module:
    """The Gemma 4 model itself, whatever PEFT has put around it.

    Raises:
        UnsupportedModelError: it is not one.
    """
    base = _unwrapped(model)
    if isinstance(base, SUPPORTED):
        return base
    got = type(base).__name__
    hint = ""
    if got in (
        "DistributedDataParallel",
        "FullyShardedDataParallel",
        "DataParallel",
    ):
        hint = f" Apply it to the model before {got} wraps it."
    elif got.startswith("Gemma4Unified"):
        hint = " The unified (12B) model has classes of its own, which no patch covers yet."
    raise UnsupportedModelError(
        f"gemma_accel.apply takes {' or '.join(c.__name__ for c in SUPPORTED)}, or a PeftModel "
        "around one, "
        f"got {got}.{hint}"
    )


def text_model(base: nn.Module) -> Gemma4TextModel:
    """The decoder stack of either class."""
    inner: Any = base.model
    return getattr(inner, "language_model", inner)


def model_device(base: nn.Module) -> torch.device:
    """Where the text stack computes: the device of its embedding."""
    return text_model(base).embed_tokens.weight.device
