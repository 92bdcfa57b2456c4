"""A training forward with labels never builds [tokens, 262144] logits, whatever trainer runs it.

TRL's own trainers ask TRL's chunked head for the loss. Plain `Trainer`, and a loop of one's own,
call the model with labels and get full logits with a float32 copy: 7 GiB per 2,048 tokens. This
hands those calls to the same TRL head. Evaluation, generation, calls without labels or with options
that need more than the loss run stock's forward; and who reads ``outputs.logits`` after all gets
them, computed when read.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import nn
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4CausalLMOutputWithPast,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
)

from gemma_accel.hookspecs import Patch
from gemma_accel.patches.seams import Undoing

__all__ = ["FULL_LOGITS", "lm_head_patch", "set_head_tile"]

FULL_LOGITS = "_gemma_accel_full_logits"
"""Set on the model where a trainer's own loss reads the logits: then they are computed as stock
does.
"""

_INNER, _FUSED = "_gemma_accel_inner_forward", "_gemma_accel_fused_head"
_ON = "_gemma_accel_lm_head"  # ours is bound and may serve
_BEHIND = "_gemma_accel_forward_behind"  # restored, but still called by a forward bound over it

# arguments whose answer needs stock's forward
_NEEDS_STOCK = (
    "logits_to_keep",
    "output_hidden_states",
    "output_attentions",
    "output_router_logits",
    "return_dict",
    "past_key_values",  # which is "cache" since transformers 5.24
    "cache",
)


class _LossOutput(Gemma4CausalLMOutputWithPast):
    """A loss, and the logits for whoever asks: by attribute, by key or by position."""

    def __init__(self, loss: Any = None, compute: Any = None, **others: Any) -> None:
        super().__init__(loss=loss, **others)
        object.__setattr__(self, "_compute", compute)

    def __getattribute__(self, name: str) -> Any:
        if name == "logits":
            compute = object.__getattribute__(self, "__dict__").get("_compute")
            if compute is not None:
                object.__setattr__(self, "_compute", None)
                self["logits"] = compute()
        return super().__getattribute__(name)

    def __getitem__(self, key: Any) -> Any:
        if key == "logits" or (not isinstance(key, str) and key != 0):
            _ = self.logits
        return super().__getitem__(key)


def _serves(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if _ON not in vars(model) or FULL_LOGITS in vars(model):
        return False
    if not (model.training and torch.is_grad_enabled()):
        return False
    labels, ids = kwargs.get("labels"), kwargs.get("input_ids", args[0] if args else None)
    if (
        labels is None
        or ids is None
        or len(args) > 1
        or any(kwargs.get(name) for name in _NEEDS_STOCK)
    ):
        return False
    if "shift_labels" in kwargs or "fused_lm_head" in kwargs:
        return False
    return type(model.get_output_embeddings()) is nn.Linear and _head_runs_on(ids.device.type)


@functools.cache
def _head_runs_on(device: str) -> bool:
    """TRL's head is Triton on a GPU; on the CPU it runs since TRL 1.16."""
    if device == "cuda":
        return True
    from trl.kernels import chunked_logprob

    return device == "cpu" and hasattr(chunked_logprob, "_forward_tile")


def set_head_tile(tokens: int) -> None:
    """Have TRL's chunked head take ``tokens`` rows of hidden states at a time, in this process."""
    from trl.kernels import chunked_logprob

    if hasattr(chunked_logprob, "TOKEN_CHUNK_SIZE"):
        chunked_logprob.TOKEN_CHUNK_SIZE = tokens


@functools.cache
def _forward_of(kind: Any) -> Any:
    """The forward for one model class, with the class's own signature, which `generate` and the
    data collation read.
    """

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        stock = vars(self).get(_INNER) or functools.partial(kind.forward, self)
        if not _serves(self, args, kwargs):
            return stock(*args, **kwargs)
        loss = _fused(self)(*args, fused_lm_head=True, **kwargs).loss
        kwargs.pop("labels")
        return _LossOutput(loss, lambda: stock(*args, **kwargs).logits)

    return forward


def _fused(model: Any) -> Any:
    """TRL's fused forward for ``model``, made once; TRL binds it to the instance, from where it is
    taken off again.
    """
    made = vars(model).get(_FUSED)
    if made is None:
        from trl.trainer.utils import add_fused_lm_head

        before = model.forward
        add_fused_lm_head(model, outputs=("log_probs",))
        made, model.forward = model.forward, before
        setattr(model, _FUSED, made)
    return made


class LMHeadPatch(Patch):
    """Binds a forward to the top model that knows when the loss alone is wanted.

    Bound as a method, so that a deep copy's is its own.
    """

    name, modality, seam = "lm_head", "text", "forward"

    def matches(self, path: str, module: nn.Module) -> bool:
        return type(module) in (Gemma4ForCausalLM, Gemma4ForConditionalGeneration)

    def why_not(self, module: nn.Module) -> str | None:
        bound = vars(module).get("forward")
        if bound is not None and getattr(bound, "__module__", "").split(".")[0] not in (
            "trl",
            "gemma_accel",
            "transformers",
        ):
            return "another library bound its own forward to the model"
        return None

    def install(self, module: Any) -> Undoing:
        setattr(module, _ON, True)
        if _BEHIND in vars(module):  # TRL's forward, bound over ours before a restore, ends in ours
            return Undoing(lambda: _turn_off(module), lambda: None)
        before = vars(module).get("forward")
        if before is not None:
            setattr(module, _INNER, before)
        kind: Any = type(module)
        module.forward = types.MethodType(_forward_of(kind), module)
        ours = vars(module)["forward"]

        def run() -> None:
            _turn_off(module)
            if vars(module).get("forward") != ours:
                setattr(module, _BEHIND, True)
                return
            vars(module).pop(_INNER, None)
            if before is None:
                del module.forward
            else:
                module.forward = before

        return Undoing(run, lambda: None)


def _turn_off(module: Any) -> None:
    for name in (_ON, _FUSED, FULL_LOGITS):
        vars(module).pop(name, None)


lm_head_patch = LMHeadPatch()
