"""A training forward with labels never builds [tokens, 262144] logits, whatever trainer runs it.

TRL's own trainers ask TRL's chunked head for the loss. Plain `Trainer`, and a loop of one's own,
call the model with labels and get full logits with a float32 copy: 7 GiB per 2,048 tokens. This
runs the backbone as stock does and gives its hidden states to the same TRL head. Evaluation,
generation, calls without labels, other losses and options that need more than the loss run stock's
forward; and who reads ``outputs.logits`` after all gets them, computed when read.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4CausalLMOutputWithPast,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
)

from gemma_accel.hookspecs import Patch
from gemma_accel.patches.attention import trained_on
from gemma_accel.patches.seams import Undoing, home_of, is_watched

__all__ = ["FULL_LOGITS", "lm_head_patch", "serves_losses", "set_head_tile"]

FULL_LOGITS = "_gemma_accel_full_logits"
"""Set on the model where a trainer's own loss reads the logits: then they are computed as stock
does.
"""

_INNER = "_gemma_accel_inner_forward"
_ON = "_gemma_accel_lm_head"  # ours is bound and may serve
_BEHIND = "_gemma_accel_forward_behind"  # restored, but still called by a forward bound over it

# arguments whose answer needs stock's forward
_NEEDS_STOCK = (
    "ignore_index",
    "shift_labels",
    "fused_lm_head",
    "return_dict",
    "past_key_values",  # which is "cache" since transformers 5.24
    "cache",
)


class _Logits:
    """Logits that are computed when something is done with them.

    No tensor, so that who copies an output value by value takes them along unread: DDP, and the
    mixed precision of Accelerate, which makes float32 of whatever has a ``dtype`` of 16 bits.
    """

    def __init__(self, compute: Callable[[], torch.Tensor], dtype: torch.dtype) -> None:
        self.tensor, self.dtype = functools.cache(compute), dtype

    def float(self) -> _Logits:
        return _Logits(lambda: self.tensor().float(), torch.float32)

    # ``values()`` and ``items()``, which the copies are made from, show users this too
    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(cls, lambda each: each.tensor(), (args, kwargs or {}))
        return func(*args, **kwargs)


def _of_the_tensor(name: str) -> Callable[..., Any]:
    def method(self: _Logits, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*args)

    return method


# Python looks these up in the class
_OPERATORS = (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
)
_OTHERS = ("neg", "pos", "abs", "invert", "lt", "le", "gt", "ge", "eq", "ne", "len", "iter")
for _name in (*_OPERATORS, *(f"r{name}" for name in _OPERATORS), *_OTHERS, "getitem", "array"):
    setattr(_Logits, f"__{_name}__", _of_the_tensor(f"__{_name}__"))
_Logits.__hash__ = object.__hash__  # type: ignore[method-assign]


class _LossOutput(Gemma4CausalLMOutputWithPast):
    """A loss, and the logits for whoever asks: by attribute, by key or by position."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if isinstance(value, _Logits):
            self[name] = value = value.tensor()
        return value

    def __getitem__(self, key: Any) -> Any:
        if key == 0:  # the loss, without the tuple of all
            return self.loss
        return self.logits if key == "logits" else super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        return self.logits if key == "logits" else super().get(key, default)


def _serves(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if _ON not in vars(model) or FULL_LOGITS in vars(model):
        return False
    if not (model.training and torch.is_grad_enabled()):
        return False
    labels, ids = kwargs.get("labels"), kwargs.get("input_ids", args[0] if args else None)
    if labels is None or ids is None or len(args) > 1:
        return False
    kept = kwargs.get("logits_to_keep", 0)
    if isinstance(kept, torch.Tensor) or kept or not model.config.return_dict:
        return False
    if any(kwargs.get(name) is not None for name in _NEEDS_STOCK):
        return False
    if model.loss_function is not ForCausalLMLoss:
        return False
    head = model.get_output_embeddings()
    return type(head) is nn.Linear and not is_watched(head) and _head_runs_on(ids.device.type)


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
        with trained_on(kwargs.get("labels"), reads_padding=_may_read_padding(self, kwargs)):
            return run(self, *args, **kwargs)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _serves(self, args, kwargs):
            stock = vars(self).get(_INNER) or functools.partial(kind.forward, self)
            return stock(*args, **kwargs)
        labels, items = kwargs.pop("labels"), kwargs.pop("num_items_in_batch", None)
        # the config's default is for generation; but without a cache positions tell documents apart
        if kwargs.get("use_cache") is None and kwargs.get("position_ids") is None:
            kwargs["use_cache"] = False
        outputs = self.base_model(*args, **kwargs)
        known: Any = {each.name: getattr(outputs, each.name, None) for each in fields(_LossOutput)}
        known["loss"] = _Headed(self, outputs).loss(labels, items)
        known["logits"] = _logits(self, outputs.last_hidden_state)
        return _LossOutput(known)

    return forward


def _may_read_padding(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether what padding predicts may be read: by who fills a cache; by `generate` without one,
    which asks for a single position; and in eval mode, where nothing has to come as in training.
    """
    if any(kwargs.get(name) is not None for name in ("past_key_values", "cache")):
        return True
    kept = kwargs.get("logits_to_keep")
    if isinstance(kept, int) and kept == 1:
        return True
    if (asked := kwargs.get("use_cache")) is None:
        asked = getattr(model.config.get_text_config(), "use_cache", True)
    return bool(asked) or not model.training


class _Headed:
    """As much of a model as TRL's fused head asks for, after its backbone has run."""

    def __init__(self, model: Any, outputs: Any) -> None:
        self.config, self.get_output_embeddings = model.config, model.get_output_embeddings
        self.base_model = lambda **_: outputs

    def forward(self, **kwargs: Any) -> Any:
        raise NotImplementedError("TRL binds its own over this")

    def loss(self, labels: torch.Tensor, items: Any) -> torch.Tensor:
        from trl.trainer.utils import add_fused_lm_head

        head: Any = self
        add_fused_lm_head(head, outputs=("log_probs",))
        return self.forward(
            fused_lm_head=True,
            labels=labels,
            num_items_in_batch=items,
            output_router_logits=False,  # stock has no loss for the router
        ).loss


def _logits(model: Any, hidden: torch.Tensor) -> _Logits:
    """Stock's logits, later: of the same hidden states, under the autocast of now."""
    head = model.get_output_embeddings()
    version = head.weight._version
    cap = model.config.get_text_config().final_logit_softcapping
    device = hidden.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def compute() -> torch.Tensor:
        if head.weight._version != version:
            raise RuntimeError(
                "outputs.logits are read after the head that makes them was changed, by an "
                "optimizer step perhaps; they would be no model's. Read them before it, or run the "
                "model in eval mode for them."
            )
        with torch.enable_grad(), torch.autocast(device, dtype, enabled):
            logits: torch.Tensor = head(hidden)
            return logits if cap is None else torch.tanh(logits / cap) * cap

    return _Logits(compute, dtype if enabled else head.weight.dtype)


class LMHeadPatch(Patch):
    """Binds a forward to the top model that knows when the loss alone is wanted.

    Bound as a method, so that a deep copy's is its own.
    """

    name, modality, seam = "lm_head", "text", "forward"

    def matches(self, path: str, module: nn.Module) -> bool:
        return type(module) in (Gemma4ForCausalLM, Gemma4ForConditionalGeneration)

    def why_not(self, module: nn.Module) -> str | None:
        bound = vars(module).get("forward")
        if bound is not None and home_of(bound) not in ("trl", "gemma_accel", "transformers"):
            return "another library bound its own forward to the model"
        return None

    def install(self, module: Any) -> Undoing:
        setattr(module, _ON, True)
        if _BEHIND in vars(module):  # TRL's forward, bound over ours before a restore, ends in ours
            return Undoing(lambda: _turn_off(module), lambda: None)
        kind: Any = type(module)
        before = vars(module).get("forward")
        if getattr(before, "__func__", None) is _forward_of(kind):  # a copy of an applied model's
            before = vars(module).pop(_INNER, None)
        if before is not None:
            setattr(module, _INNER, before)
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


def serves_losses(model: nn.Module) -> bool:
    """Whether the patch is in."""
    return _ON in vars(model)


def _turn_off(module: Any) -> None:
    for name in (_ON, FULL_LOGITS):
        vars(module).pop(name, None)


lm_head_patch = LMHeadPatch()
