"""The GPU memory a model may live in."""

from __future__ import annotations

import torch
from torch import nn

from gemma_accel.errors import BudgetError
from gemma_accel.models import model_device
from gemma_accel.planner import require_gib

__all__ = ["memory_budget", "weights_gib"]

GIB = 2**30


def memory_budget(base: nn.Module, vram_gib: float | None) -> float | None:
    """The budget in GiB: what was asked for, or the smaller of what the device has left for this
    process and the allocator's cap.

    None on a device without memory of its own (the CPU) when nothing was asked for.

    Raises:
        BudgetError: less than the weights that must be on the device.
        ValueError: not a positive, finite number.
    """
    if vram_gib is not None:
        require_gib("vram_gib", vram_gib)
    device = model_device(base)
    if vram_gib is None:
        vram_gib = _device_budget(device)
    if vram_gib is None:
        return None
    needed = weights_gib(base)
    if vram_gib < needed:
        raise BudgetError(
            f"vram_gib={vram_gib:g} is less than the weights alone need on the device "
            f"({needed:.2f} GiB, the per-layer table and the "
            f"towers of a text-only run left out). Give at least {needed + 0.5:.1f}, or load the "
            "model in 4 bits "
            "(quantization_config=BitsAndBytesConfig(load_in_4bit=True, "
            "bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True))."
        )
    return vram_gib


def _device_budget(device: torch.device) -> float | None:
    if device.type == "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())  # where a Trainer will take it
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device)
    cap = torch.cuda.get_per_process_memory_fraction(device) * total
    return min(free + held, cap) / GIB


def weights_gib(base: nn.Module) -> float:
    """GiB of the parameters that a text-only adapter run keeps on the device."""
    inner = base.model
    towers = [
        getattr(inner, name, None)
        for name in ("vision_tower", "audio_tower", "embed_vision", "embed_audio")
    ]
    left_out = {id(p) for tower in towers if tower is not None for p in tower.parameters()}
    table = getattr(getattr(inner, "language_model", inner), "embed_tokens_per_layer", None)
    if table is not None:
        left_out |= {id(p) for p in table.parameters()}
    total = 0
    for parameter in base.parameters():
        if id(parameter) not in left_out:
            left_out.add(id(parameter))  # counted once, where several modules share it
            total += parameter.numel() * parameter.element_size()
    return total / GIB
