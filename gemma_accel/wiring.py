"""What happens to an applied model when a Trainer is built around it.

`apply` wraps three methods of `transformers.Trainer` once for the process; the last `restore()`
takes the wrappers off. For a model that is not applied they do nothing. `__init__` is the moment at
which it is known what will be trained (TRL's PEFT wrapping happens just before it) and before the
optimizer exists; `train` reaches a trainer that was built before `apply`, and `call_model_init` the
model that `train` has made anew where the trainer was given a `model_init`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from gemma_accel import allocator, guards
from gemma_accel.hotpath import remembered
from gemma_accel.models import base_model, is_gemma4, model_device, text_model
from gemma_accel.report import Report

__all__ = ["apply_automatically", "hold_trainer_wrappers", "live_in", "on_applied"]

_holders = 0
_originals: dict[str, Any] = {}
_automatic = False


def on_applied(
    model: Any, base: nn.Module, report: Report, budget: float | None, *, capped: bool
) -> None:
    """Finish an `apply`: the loss-scaling flag, the Trainer's wrappers, the memory to live in, and
    the table where it is already known to be frozen. ``capped``: the budget is the user's own
    figure, which the allocator is then held to.
    """
    from gemma_accel.accumulation import accept_loss_kwargs
    from gemma_accel.patches.per_layer import FusedGemma4TextModel, settle_table

    report._undos.append(accept_loss_kwargs(base))
    for let_go in (hold_trainer_wrappers(), allocator.expand_segments()):
        _when_dropped(base, let_go)
        report._undos.append(let_go)
    report._undos.append(report._uncap)
    report._undos.append(guards.guard_model(base, report))
    live_in(base, report, budget, capped=capped)
    report._way_back = _WayBack(base)
    text = text_model(base)
    if hasattr(model, "peft_config") and isinstance(text, FusedGemma4TextModel):
        report.note("per-layer table", settle_table(text, model_device(base)))


def _when_dropped(base: nn.Module, let_go: Callable[[], None]) -> None:
    """A model that is dropped without `restore` lets go too; a process that ends need not."""
    weakref.finalize(base, let_go).atexit = False


class _WayBack:
    """For what left the GPU: the table (`Report.restore` says where to) and the towers."""

    def __init__(self, base: nn.Module) -> None:
        self._base = weakref.ref(base)

    def obstacle(self) -> str | None:
        """Why the table cannot be had back from its file, if so."""
        from gemma_accel.hostmemory import StaleFileError
        from gemma_accel.patches.per_layer import HostPerLayerEmbedding

        base = self._base()
        for module in base.modules() if base is not None else ():
            if isinstance(module, HostPerLayerEmbedding) and module.host is not None:
                try:
                    module.host.check()
                except StaleFileError as error:
                    return str(error).rstrip(".")
        return None

    def __call__(self, device: Any) -> None:
        from gemma_accel.patches.per_layer import bring_table_back
        from gemma_accel.patches.towers import bring_towers_back

        if (base := self._base()) is not None:
            text: Any = text_model(base)
            bring_table_back(text, None if device is None else torch.device(device))
            bring_towers_back(base, text.embed_tokens.weight.device)


def live_in(base: nn.Module, report: Report, budget: float | None, *, capped: bool) -> None:
    """Set the memory to live in, GiB: for the plan, the layers' choices, and the allocator."""
    report._plan = functools.partial(_plan, weakref.ref(base), budget)
    if capped and budget is not None and torch.cuda.is_available():
        report._uncap()
        report._cap = allocator.hold_to(budget, model_device(base))
        _when_dropped(base, report._cap)
        report.note("memory", f"the allocator is held to {budget:g} GiB")
    policy = getattr(text_model(base), "memory", None)
    if policy is not None and budget is not None:
        policy.set_budget(int(budget * 2**30))
        policy.tell = functools.partial(_tell, weakref.ref(report))


def _tell(report: Callable[[], Report | None], topic: str, text: str) -> None:
    # weakly: the policy is reached from a step's graph, which would then hold the whole model
    if (alive := report()) is not None:
        alive.note(topic, text)


def _plan(base: Any, budget: float | None, **batch: Any) -> Any:
    from gemma_accel.planner import plan_for_model

    model = base()
    if model is None:
        raise RuntimeError("the model that this report belongs to is gone")
    return plan_for_model(model, budget, **batch)


def apply_automatically() -> None:
    """From now on a Gemma 4 model is applied when a Trainer is built around it
    (`gemma_accel.auto`).
    """
    global _automatic
    if not _automatic:
        _automatic = True
        hold_trainer_wrappers()


def hold_trainer_wrappers() -> Callable[[], None]:
    """Wrap the `Trainer`'s methods if nobody has yet; the last holder to let go unwraps them."""
    global _holders
    from transformers import Trainer

    if _holders == 0:
        for name, wrap in _WRAPS.items():
            _originals[name] = getattr(Trainer, name)
            setattr(Trainer, name, wrap(_originals[name]))
    _holders += 1
    held = True

    def let_go() -> None:
        nonlocal held
        global _holders
        if not held:
            return
        held = False
        _holders -= 1
        if _holders == 0:
            for name, original in _originals.items():
                if getattr(getattr(Trainer, name), "__wrapped__", None) is original:
                    setattr(Trainer, name, original)
            _originals.clear()

    return let_go


def _wrap_init(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        model = kwargs.get("model", args[0] if args else None)
        arguments = kwargs.get("args", args[1] if len(args) > 1 else None)
        dataset = kwargs.get("train_dataset", args[3] if len(args) > 3 else None)
        report = _report_for(model)
        if report is not None:
            _prepare(self, model, arguments, dataset, report)
        original(self, *args, **kwargs)
        if report is None:
            report = _report_for(self.model)  # `model_init` built it
            if report is None:
                return
            _prepare(self, self.model, self.args, self.train_dataset, report)
        _attach(self, report)

    return __init__


def _wrap_train(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        report = _report_for(self.model)
        if report is not None and not getattr(self, "_gemma_accel_prepared", False):
            _prepare(
                self, self.model, self.args, self.train_dataset, report
            )  # built before `apply`
        if report is not None:
            _attach(self, report)
            if os.environ.get("GEMMA_ACCEL_VERIFY", "0") not in ("", "0"):
                from gemma_accel.verification import verify_before_training

                verify_before_training(self)
            # not of a model that is about to be made anew: it would be held beside the new one
            held = remembered(self.model) if self.model_init is None else contextlib.nullcontext()
            del report
            with held, _let_go_at_the_end(self):
                return original(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    return train


@contextlib.contextmanager
def _let_go_at_the_end(trainer: Any) -> Iterator[None]:
    """A training that an error ends leaves the trainer's methods as they were, too."""
    from gemma_accel.callback import GradientAccumulationCallback

    try:
        yield
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, GradientAccumulationCallback):
                callback.detach()


def _wrap_model_init(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call_model_init(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = original(self, *args, **kwargs)
        if hasattr(self, "callback_handler"):  # `train` has it made anew
            report = _report_for(model)
            if report is not None:
                self.model = model
                _prepare(self, model, self.args, self.train_dataset, report)
                _attach(self, report)
        return model

    return call_model_init


_WRAPS = {"__init__": _wrap_init, "train": _wrap_train, "call_model_init": _wrap_model_init}


def _report_for(model: Any) -> Report | None:
    from gemma_accel.patching import apply, report_of

    if model is None or not is_gemma4(model):
        return None
    report = report_of(model)
    if report is None and _automatic:
        report = apply(model)
    return report


def _prepare(trainer: Any, model: Any, arguments: Any, dataset: Any, report: Report) -> None:
    """Everything that must be settled between PEFT's wrapping and the optimizer."""
    from gemma_accel.patches.decoder import left_to_stock
    from gemma_accel.patches.lora import stepped_aside
    from gemma_accel.patches.per_layer import FusedGemma4TextModel, settle_table
    from gemma_accel.patches.towers import settle_towers

    base = base_model(model)
    text = text_model(base)
    if arguments is not None:
        _refuse_reentrant(text, arguments)
    device = arguments.device if arguments is not None else text.embed_tokens.weight.device
    if isinstance(text, FusedGemma4TextModel):
        report.note("per-layer table", settle_table(text, device))
    report.note("towers", settle_towers(base, trainer, dataset))
    autocast = arguments is not None and (arguments.bf16 or arguments.fp16)
    flow = None if autocast else text.embed_tokens.weight.new_empty(0, device="cpu")
    for path, reason in stepped_aside(base, flow):
        report.skip("lora", "text", path, reason)
    for patch, path, reason in left_to_stock(base):
        report.skip(patch, "text", path, reason)
    trainer._gemma_accel_prepared = True


def _attach(trainer: Any, report: Report) -> None:
    """Give the trainer its callback, unless the user already did."""
    from gemma_accel.accumulation import has_own_loss
    from gemma_accel.callback import GradientAccumulationCallback
    from gemma_accel.inputs import CheckedIds
    from gemma_accel.patches.attention import belongs_to_trainer
    from gemma_accel.patches.lm_head import FULL_LOGITS, serves_losses
    from gemma_accel.patches.seams import home_of

    guards.check_trainer(trainer, report)
    callbacks = trainer.callback_handler.callbacks
    callback = next((c for c in callbacks if isinstance(c, GradientAccumulationCallback)), None)
    if callback is None:
        callback = GradientAccumulationCallback()
        trainer.add_callback(callback)
    callback.attach(trainer, report=report)
    base = base_model(trainer.model)
    if serves_losses(base):  # whose forward tells of caches
        belongs_to_trainer(text_model(base))
    vars(base).pop(FULL_LOGITS, None)  # the trainer before this one set it
    if home_of(type(trainer).compute_loss) not in ("transformers", "trl"):
        setattr(base, FULL_LOGITS, True)  # a loss of the user's own may read the logits
    collator = trainer.data_collator
    if isinstance(collator, CheckedIds):  # attached before, or another trainer's
        collator = vars(collator)["collator"]
    trainer.data_collator = CheckedIds(collator, text_model(base).config, has_own_loss(trainer))
    _tell_policy(trainer)


def _tell_policy(trainer: Any) -> None:
    """What the model, its gradients and its optimizer will take on the device, now that all of it
    is known.
    """
    from gemma_accel.patches.towers import watch_towers

    base = base_model(trainer.model)
    policy = getattr(text_model(base), "memory", None)
    if policy is None:
        return
    seen: dict[int, tuple[int, bool]] = {}
    for parameter in trainer.model.parameters():
        # the scales of a 4-bit weight are no parameters of their own
        for tensor in (parameter, *_scales(getattr(parameter, "quant_state", None))):
            if tensor.is_cuda:
                seen[tensor.untyped_storage().data_ptr()] = (tensor.nbytes, tensor.requires_grad)
    weights = sum(nbytes for nbytes, _ in seen.values())
    trained = sum(nbytes for nbytes, is_trained in seen.values() if is_trained)
    # a gradient and two moments, at most in the parameter's own dtype
    policy.set_fixed(weights + trained * 3, trained)
    watch_towers(base, policy)


def _scales(state: Any) -> Iterator[torch.Tensor]:
    """The tensors of a bitsandbytes ``QuantState``, nested ones too."""
    while state is not None:
        yield from (t for t in (state.absmax, state.offset) if isinstance(t, torch.Tensor))
        state = getattr(state, "state2", None)  # which packing for the CPU deletes


def _refuse_reentrant(text: Any, arguments: Any) -> None:
    """Reentrant checkpointing computes wrong gradients where layers share keys and values; switch
    it off, loudly.
    """
    options = getattr(arguments, "gradient_checkpointing_kwargs", None)
    shares = any(layer.self_attn.is_kv_shared_layer for layer in text.layers)
    if shares and arguments.gradient_checkpointing and options and options.get("use_reentrant"):
        warnings.warn(
            "gradient_checkpointing_kwargs={'use_reentrant': True} gives silently wrong gradients "
            "on a Gemma 4 model whose layers "
            "share keys and values (E2B, E4B): they pass from layer to layer as a side effect "
            "that reentrant recomputation loses. "
            "gemma_accel switched it to False; remove the option to silence this.",
            UserWarning,
            stacklevel=4,
        )
        options["use_reentrant"] = False
