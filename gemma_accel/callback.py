"""The callback that a Trainer on an applied model carries: every token of an optimizer step weighs
the same (`gemma_accel.accumulation` says what that takes), and three numbers are in its logs.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from gemma_accel.accumulation import (
    MICRO_BATCHES_WEIGH_THE_SAME,
    REMEDY,
    STEP_REMEDY,
    OwnLoss,
    Window,
    count_tokens,
    gemma4,
    has_own_loss,
    name_of,
    reads_embeddings,
    sees_to_itself,
    steps_by_itself,
    stock_flag,
    warn,
    warn_without_trainer,
)
from gemma_accel.errors import KernelError
from gemma_accel.failures import kernel_failure
from gemma_accel.patches.attention import trained_on
from gemma_accel.patches.seams import Undoing, home_of, set_attribute
from gemma_accel.report import Report
from gemma_accel.telemetry import Utilisation

__all__ = ["GradientAccumulationCallback"]


class GradientAccumulationCallback(TrainerCallback):
    """Makes every token of an optimizer step weigh the same under gradient accumulation, whatever
    Gemma 4 class is trained, and refuses to stay silent where it cannot. Logs ``gpu_peak_gib``,
    ``tokens_per_second`` and ``mfu`` into the Trainer's own logs.

    A Trainer built on an applied model carries it without being asked. Without `apply`, give it its
    trainer, which no callback sees by itself; passed in ``callbacks`` alone it can only warn:

        trainer = SFTTrainer(model, ...)
        GradientAccumulationCallback().attach(trainer)

    ``gpu_peak_gib`` is `torch.cuda.max_memory_reserved` of the Trainer's device (no key without
    CUDA). ``tokens_per_second`` counts the elements of the ``input_ids`` that this process trained
    on, padding included, from shapes alone, over the wall time since the last log; evaluating and
    saving are left out of the time. ``mfu`` is the share of the card's peak that the arithmetic of
    those tokens takes, and is left out on a card whose peak is not known (`gemma_accel.telemetry`).
    The last entry, with ``train_runtime``, has the whole run's.

    There is nothing to carry over a resume, so it is no `ExportableState`: the Trainer would put a
    copy in its place that has no trainer.
    """

    def __init__(self) -> None:
        self._trainer_ref: Callable[[], Any] = lambda: None
        self._report: Report | None = None
        self._undos: list[Undoing] = []
        self._window: Window | None = None
        self._pace = _Pace()
        self._utilisation = Utilisation()

    def attach(self, trainer: Any, *, report: Report | None = None) -> None:
        """Correct ``trainer`` (a second time changes nothing), and write ``report`` into its
        checkpoints.

        The Trainer's methods are wrapped when training begins and its own again when it ends. A
        callback of this class that the trainer already has steps aside.
        """
        self._trainer_ref = weakref.ref(trainer)
        callbacks = trainer.callback_handler.callbacks
        for other in [c for c in callbacks if isinstance(c, type(self)) and c is not self]:
            callbacks.remove(other)
            report = report or other._report
        if self not in callbacks:
            trainer.add_callback(self)
        self._report = report or self._report
        count_tokens(trainer)

    def detach(self) -> None:
        """Give the Trainer its own methods back; `on_train_end` does it too."""
        self._window = None
        while self._undos:
            undo = self._undos.pop()
            if undo.obstacle() is None:  # else somebody wrapped it since, ours inside: it stays
                undo()

    # ---- the Trainer's events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.detach()
        trainer = self._trainer(state)
        if trainer is None:
            warn_without_trainer(args, kwargs.get("model"))
            return
        _check_tables(trainer.model)
        if self._report is not None and not reads_embeddings(trainer):
            self._undos.extend(_spare_the_frozen_bottom(trainer.model, self._note))
        self._correct(trainer, args)
        self._wrap(trainer, "training_step", partial(self._training_step, trainer.training_step))
        self._wrap(trainer, "prediction_step", partial(self._step, trainer.prediction_step))
        self._wrap(trainer, "log", partial(self._log, trainer.log))
        self._utilisation = Utilisation(trainer)
        self._pace.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._window is not None:
            self._window.verify()
            self._window = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pace.step_ended()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pace.leave_out()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._report is not None and not self._report.restored and args.should_save:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            try:
                self._report.write(checkpoint if checkpoint.is_dir() else args.output_dir)
            except OSError as error:  # the checkpoint itself is there: no reason to end the run
                warn(f"the report could not be written beside the checkpoint: {error}")
        self._pace.leave_out()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        # Of an attached trainer `log` itself is wrapped: reporters get their logs before this.
        if self._trainer(state) is None and logs is not None and "loss" in logs:
            peak = _gpu_peak(args.device)
            logs.update(peak)
            state.log_history[-1].update(peak)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.detach()

    # ---- what it does to the trainer

    def _correct(self, trainer: Any, args: Any) -> None:
        accumulates = args.gradient_accumulation_steps > 1
        accepted = trainer.model_accepts_loss_kwargs
        # Not only in `attach`: a subclass's __init__ may have changed the flag after it.
        if not count_tokens(trainer):
            self._leave_uncounted(trainer, accumulates)
            return
        self._note("gradient accumulation", "every token of an optimizer step weighs the same")
        if args.world_size > 1 and not args.average_tokens_across_devices:
            warn(
                "average_tokens_across_devices=False: each process averages over its own tokens, "
                "so those of different processes weigh differently. Leave it at its default, True."
            )
        if accumulates and has_own_loss(trainer):
            self._wrap(trainer, "compute_loss", OwnLoss(trainer, accepted, self._note))
        if accumulates and args.world_size == 1:
            self._window = Window()
            self._wrap(trainer, "compute_loss", partial(self._seen, trainer.compute_loss))

    def _leave_uncounted(self, trainer: Any, accumulates: bool) -> None:
        """As stock has it, which a warning says where tokens then weigh differently."""
        if steps_by_itself(trainer) and not sees_to_itself(trainer):
            # the model may have said that it takes the count when the Trainer was built
            accepted = trainer.model_accepts_loss_kwargs
            trainer.model_accepts_loss_kwargs = stock_flag(trainer, accepted)
            remedy = f"{name_of(trainer)} has a training_step of its own. {STEP_REMEDY}"
        else:
            remedy = REMEDY
        counted = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func
        if accumulates and not (counted or sees_to_itself(trainer)):
            warn(f"{name_of(trainer)}: {MICRO_BATCHES_WEIGH_THE_SAME} {remedy}")

    def _seen(
        self, original: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kw: Any
    ) -> Any:
        """``original`` of a micro-batch, whose labels are counted as the loss meets them."""
        if self._window is not None and model.training:
            items = args[1] if len(args) > 1 else kw.get("num_items_in_batch")
            self._window.meet(inputs, items)
        return original(model, inputs, *args, **kw)

    def _training_step(
        self, original: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if isinstance(inputs, Mapping):
            if (ids := inputs.get("input_ids")) is not None:
                self._pace.tokens += ids.numel()
            self._utilisation.add(inputs)
        loss = self._step(original, model, inputs, *args, **kwargs)
        if self._window is not None:
            self._window.step_ended()
        return loss

    def _step(
        self, original: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """A step whose labels attention knows, whoever's forward asks the model."""
        with trained_on(inputs.get("labels") if isinstance(inputs, Mapping) else None):
            return self._explained(original, model, inputs, *args, **kwargs)

    def _explained(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What ``original`` does, a kernel's failure in it told in words that help."""
        try:
            return original(*args, **kwargs)
        except Exception as error:
            if (failure := kernel_failure(error, self._report)) is not None:
                raise KernelError(failure) from error
            raise

    def _log(
        self, original: Callable[..., None], logs: dict[str, float], *args: Any, **kwargs: Any
    ) -> None:
        trainer = self._trainer_ref()
        if trainer is not None and ("loss" in logs or "train_runtime" in logs):  # no evaluation's
            logs.update(_gpu_peak(trainer.args.device))
            whole_run = "train_runtime" in logs
            pace = self._pace.report(whole_run=whole_run)
            logs.update(pace)
            per_second = pace.get("tokens_per_second")
            logs.update(self._utilisation.report(per_second, whole_run=whole_run))
        original(logs, *args, **kwargs)

    def _trainer(self, state: Any) -> Any:
        """The attached trainer, if it is the one whose event this is."""
        trainer = self._trainer_ref()
        return trainer if trainer is not None and trainer.state is state else None

    def _wrap(self, trainer: Any, name: str, wrapper: Callable[..., Any]) -> None:
        self._undos.append(set_attribute(trainer, name, wrapper))

    def _note(self, topic: str, text: str) -> None:
        if self._report is not None:
            self._report.note(topic, text)


# ---- files that a run depends on


def _check_tables(model: nn.Module) -> None:
    """Raise `StaleFileError` where a per-layer table's file is not the one that was loaded."""
    from gemma_accel.patches.per_layer import HostPerLayerEmbedding

    for module in model.modules():
        if isinstance(module, HostPerLayerEmbedding) and module.host is not None:
            module.host.check()


# ---- numbers for the logs


def _gpu_peak(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {}
    return {"gpu_peak_gib": round(torch.cuda.max_memory_reserved(device) / 2**30, 3)}


class _Pace:
    """Tokens over wall time, without the time that evaluating and saving take."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.tokens = self.all_tokens = 0
        self.all_seconds = 0.0
        self.since = self.step_end = time.perf_counter()

    def step_ended(self) -> None:
        self.step_end = time.perf_counter()

    def leave_out(self) -> None:
        """Take what has passed since the last step out of the time."""
        now = time.perf_counter()
        self.since += now - self.step_end
        self.step_end = now

    def report(self, *, whole_run: bool) -> dict[str, float]:
        now = time.perf_counter()
        tokens, seconds = self.tokens, now - self.since
        self.all_tokens += tokens
        self.all_seconds += seconds
        self.tokens, self.since, self.step_end = 0, now, now
        if whole_run:
            tokens, seconds = self.all_tokens, self.all_seconds
        return {"tokens_per_second": round(tokens / seconds, 1)} if tokens and seconds > 0 else {}


# ---- backward below the lowest adapter


def _spare_the_frozen_bottom(model: Any, note: Callable[[str, str], None]) -> list[Undoing]:
    """Take off the hooks that make the embeddings' output require grad; the undos put them back.

    PEFT, TRL and `gradient_checkpointing_enable` each add one, for reentrant checkpointing. Without
    that they only make backward go on below the lowest adapter, through the first layer and the
    per-layer projection, where nothing is trained. (An embedding that is trained needs no hook.)
    """
    modules = list(model.modules())
    if not hasattr(model, "peft_config") or gemma4(model) is None:
        return []
    if any(map(_checkpoints_reentrantly, modules)):
        return []
    undos = []
    for module in modules:
        hooks = module._forward_hooks
        forcing = {key: hook for key, hook in hooks.items() if _forces_grad(hook)}
        # a hook of somebody's own may look at the output's gradient
        if forcing and all(map(_is_theirs, hooks.values())):
            for key in forcing:
                del hooks[key]
            undos.append(Undoing(partial(hooks.update, forcing), lambda: None))
    if undos:
        note("input gradients", "not computed below the lowest adapter, where nothing is trained")
    return undos


def _checkpoints_reentrantly(module: nn.Module) -> bool:
    """Or in a way that cannot be told."""
    if not getattr(module, "gradient_checkpointing", False):
        return False
    # as Transformers set it: a fused layer's attribute of that name is the memory policy in front
    stock = vars(module).get("_gradient_checkpointing_func")
    options = getattr(stock, "keywords", {})
    return bool(options.get("use_reentrant", True))


def _forces_grad(hook: Any) -> bool:
    return getattr(hook, "__name__", "").startswith("make_inputs_require_grad") and _is_theirs(hook)


def _is_theirs(hook: Any) -> bool:
    return home_of(hook) in ("transformers", "peft", "trl")
