"""A model in use is borrowed: what the runs set on it, and how it is given back as it was."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gemma_accel.memory import HEAD_TILE, Arrangement, Mode

__all__ = [
    "adapters_awake",
    "attributes_kept",
    "checkpoint_layers",
    "gradients_aside",
    "memory_modes",
]


@contextlib.contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Gives every module its attributes back: modes, what patches set, what a run leaves behind."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            now = vars(module)
            for name in now.keys() - attributes.keys():
                del now[name]
            now.update(attributes)


def checkpoint_layers(text: Any, *, anew: bool = False) -> None:
    """Checkpointing as Transformers sets it up by default, where there is none. Inside
    `attributes_kept`.
    """
    for layer in text.layers:
        if anew or not layer.gradient_checkpointing:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)


@contextlib.contextmanager
def memory_modes(text: Any, modes: list[Mode]) -> Iterator[None]:
    """The text model's layers are checkpointed, in these modes by turns. Inside
    `attributes_kept`.
    """
    policy = text.memory
    budget = policy.budget
    policy.budget = budget or 1 << 60
    by_turns = [modes[i % len(modes)] for i in range(len(text.layers))]
    policy.forced = Arrangement(by_turns, graphed=False, head_tile=HEAD_TILE)
    checkpoint_layers(text, anew=True)
    try:
        yield
    finally:
        policy.budget = budget
        policy.forced = None


@contextlib.contextmanager
def gradients_aside(model: nn.Module) -> Iterator[None]:
    """No parameter has a gradient inside; each has its own again after."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


@contextlib.contextmanager
def adapters_awake(model: nn.Module) -> Iterator[None]:
    """A fresh adapter's B is all zeros, which hides what A's side gets wrong: it is not, inside."""
    asleep = [
        (parameter, parameter.data)
        for name, parameter in model.named_parameters()
        if "lora_B" in name or "lora_embedding_B" in name
        if parameter.requires_grad and not parameter.detach().any()
    ]
    generator = torch.Generator().manual_seed(4)
    for parameter, zeros in asleep:
        parameter.data = (torch.randn(zeros.shape, generator=generator) * 0.02).to(zeros)
    try:
        yield
    finally:
        for parameter, zeros in asleep:
            parameter.data = zeros
