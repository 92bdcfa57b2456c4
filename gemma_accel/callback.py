"""Gradient accumulation in which every token of an optimizer step weighs the same, and three
numbers in the Trainer's logs.

The gradient of an optimizer step should be that of ``sum of the token losses / labelled tokens``
over all its micro-batches. Transformers sees to that only where the model says
`accepts_loss_kwargs`: then the Trainer counts the tokens of the window and hands the count,
`num_items_in_batch`, to the loss. `Gemma4ForConditionalGeneration` says no although its loss takes
the count, so each micro-batch is averaged on its own and a short one outweighs a long one: with 3,
60, 8 and 40 labelled tokens the gradient is off by as much as its own length, while the logged loss
looks right. The flag is read once, when the Trainer is built; after that only the Trainer's copy of
it counts.

A loss of the user's own (`compute_loss_func`, an overridden `compute_loss`) is tried out on the
first micro-batch before anything is corrected: see `_OwnLoss`.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import unwrap_peft_model

from gemma_accel.errors import KernelError
from gemma_accel.failures import kernel_failure
from gemma_accel.hookspecs import Undo
from gemma_accel.inputs import IGNORED
from gemma_accel.patches.attention import trained_on
from gemma_accel.patches.seams import Undoing, set_attribute
from gemma_accel.report import Report
from gemma_accel.telemetry import Utilisation

__all__ = ["GradientAccumulationCallback", "accept_loss_kwargs"]

logger = logging.getLogger(__name__)


def accept_loss_kwargs(base: nn.Module) -> Undo:
    """Let the Trainers built on ``base`` hand it the window's token count; returns the undo.

    Nothing happens where the model accepts it already, or where its class does not say (the Trainer
    then finds out by itself).
    """
    if getattr(base, "accepts_loss_kwargs", True):
        return lambda: None
    return set_attribute(base, "accepts_loss_kwargs", True)


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
        self._window: _Window | None = None
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
        _count_tokens(trainer)

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
            _warn_without_trainer(args, kwargs.get("model"))
            return
        _check_tables(trainer.model)
        self._correct(trainer, args)
        self._wrap(trainer, "training_step", partial(self._training_step, trainer.training_step))
        self._wrap(trainer, "prediction_step", partial(self._step, trainer.prediction_step))
        self._wrap(trainer, "log", partial(self._log, trainer.log))
        if self._report is not None:
            self._undos.extend(_spare_the_frozen_bottom(trainer.model, self._note))
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
                _warn(f"the report could not be written beside the checkpoint: {error}")
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
        if not _count_tokens(trainer):
            self._leave_uncounted(trainer, accumulates)
            return
        self._note("gradient accumulation", "every token of an optimizer step weighs the same")
        if args.world_size > 1 and not args.average_tokens_across_devices:
            _warn(
                "average_tokens_across_devices=False: each process averages over its own tokens, "
                "so those of different processes weigh differently. Leave it at its default, True."
            )
        if accumulates and _has_own_loss(trainer):
            self._wrap(trainer, "compute_loss", _OwnLoss(trainer, accepted, self._note))
        if accumulates and args.world_size == 1:
            self._window = _Window()
            self._wrap(trainer, "compute_loss", partial(self._seen, trainer.compute_loss))

    def _leave_uncounted(self, trainer: Any, accumulates: bool) -> None:
        """As stock has it, which a warning says where tokens then weigh differently."""
        if _steps_by_itself(trainer) and not _sees_to_itself(trainer):
            # the model may have said that it takes the count when the Trainer was built
            accepted = trainer.model_accepts_loss_kwargs
            trainer.model_accepts_loss_kwargs = _stock_flag(trainer, accepted)
            remedy = f"{_name(trainer)} has a training_step of its own. {_STEP_REMEDY}"
        else:
            remedy = _REMEDY
        counted = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func
        if accumulates and not (counted or _sees_to_itself(trainer)):
            _warn(f"{_name(trainer)}: {_MICRO_BATCHES_WEIGH_THE_SAME} {remedy}")

    def _seen(
        self, original: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kw: Any
    ) -> Any:
        """``original`` of a micro-batch, whose labels are counted as the loss meets them."""
        if self._window is not None and model.training:
            items = args[1] if len(args) > 1 else kw.get("num_items_in_batch")
            self._window.add(inputs, items)
        return original(model, inputs, *args, **kw)

    def _training_step(
        self, original: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if isinstance(inputs, Mapping):
            if (ids := inputs.get("input_ids")) is not None:
                self._pace.tokens += ids.numel()
            self._utilisation.add(inputs)
        return self._step(original, model, inputs, *args, **kwargs)

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


# ---- whose loss it is, and whether the Trainer counts tokens for it

_MICRO_BATCHES_WEIGH_THE_SAME = (
    "under gradient accumulation each micro-batch is averaged on its own, so a token of a short "
    "one weighs more than a token of a long one."
)
_STEP_REMEDY = (
    "Let it end in super().training_step(model, inputs, num_items_in_batch), or set "
    "loss_is_scaled_for_ga on the Trainer: True where its loss is scaled for the whole optimizer "
    "step, False where it is the mean over one micro-batch."
)
_REMEDY = (
    "Call gemma_accel.apply(model) before the Trainer is built, or "
    "GradientAccumulationCallback().attach(trainer) before it trains."
)


def _gemma4(model: Any) -> nn.Module | None:
    """The Gemma 4 language model in ``model`` (the unified one too): its loss takes the count."""
    base = unwrap_peft_model(model)
    for cls in type(base).__mro__:
        if cls.__module__.startswith("transformers.models.gemma4"):
            speaks = cls.__name__.endswith(("ForConditionalGeneration", "ForCausalLM"))
            return base if speaks else None
    return None


def _base(trainer: Any) -> nn.Module:
    return unwrap_peft_model(trainer.accelerator.unwrap_model(trainer.model))


def _count_tokens(trainer: Any) -> bool:
    """Have ``trainer`` count tokens for its loss. False where that is not ours to decide."""
    if _says_how_it_scales(trainer):
        if not hasattr(Trainer, "loss_is_scaled_for_ga") and not _is_trls(trainer):
            # transformers < 5.19 does not read it; TRL sees to that for its own trainers
            trainer.model_accepts_loss_kwargs = bool(trainer.loss_is_scaled_for_ga)
        return False
    if _sees_to_itself(trainer) or _gemma4(_base(trainer)) is None or _steps_by_itself(trainer):
        return False
    trainer.model_accepts_loss_kwargs = True
    return True


def _stock_flag(trainer: Any, accepted: bool) -> bool:
    """What ``model_accepts_loss_kwargs``, ``accepted`` before, is without `apply`."""
    return accepted and getattr(type(_base(trainer)), "accepts_loss_kwargs", True)


def _steps_by_itself(trainer: Any) -> bool:
    """Whether a `training_step` of its own stands between the count and the loss: a user's that
    does not end in the Trainer's, and may divide the loss by itself, or one of TRL's beyond SFT's,
    which may train on other labels than the data has (GKD's does).
    """
    step = type(trainer).training_step
    home = (getattr(step, "__module__", None) or "").split(".")[0]
    if home == "trl":
        return not step.__qualname__.startswith("SFTTrainer.")
    code = getattr(step, "__code__", None)
    return home != "transformers" and (code is None or "training_step" not in code.co_names)


def _says_how_it_scales(trainer: Any) -> bool:
    """As the classes of TRL do for DPO, KTO, rewards, GRPO and others."""
    return getattr(trainer, "loss_is_scaled_for_ga", None) is not None


def _sees_to_itself(trainer: Any) -> bool:
    """Whether the Trainer has a normalisation of its own (under sequence parallelism it has)."""
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    return _says_how_it_scales(trainer) or (
        parallel is not None and parallel.sp_backend == "deepspeed" and bool(parallel.sp_enabled)
    )


def _is_trls(trainer: Any) -> bool:
    return any(cls.__module__.startswith("trl.") for cls in type(trainer).__mro__)


def _has_own_loss(trainer: Any) -> bool:
    """Whether anything but Transformers' and TRL's own code computes the loss."""
    home = (getattr(trainer.compute_loss, "__module__", None) or "").split(".")[0]
    return (
        home not in ("transformers", "trl")
        or callable(trainer.compute_loss_func)
        or "_loss_function" in vars(_base(trainer))
    )


def _warn_without_trainer(args: Any, model: Any) -> None:
    base = unwrap_peft_model(model)
    if args.gradient_accumulation_steps > 1 and not getattr(base, "accepts_loss_kwargs", True):
        _warn(
            f"{type(base).__name__} says accepts_loss_kwargs=False: "
            f"{_MICRO_BATCHES_WEIGH_THE_SAME} This callback was not given its trainer and cannot "
            f"correct it. {_REMEDY}"
        )


def _name(trainer: Any) -> str:
    function = trainer.compute_loss_func
    if callable(function):
        return f"compute_loss_func {getattr(function, '__name__', type(function).__name__)!r}"
    return type(trainer).__name__


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=2)


# ---- counting


def _label_key(inputs: Mapping[str, Any]) -> str:
    return "shift_labels" if "shift_labels" in inputs else "labels"


def _counted(key: str, labels: Tensor) -> Tensor:
    """Which labels are predicted. A row's first is nobody's next token, unless already shifted."""
    mask = labels != IGNORED
    if key == "labels":
        mask[..., 0] = False
    return mask


class _Window:
    """The first optimizer step's labels against the count that its loss was divided by: whatever
    comes between the data loader and the loss shows. One synchronisation, once a training.
    """

    def __init__(self) -> None:
        self.counts: list[Tensor] = []
        self.items: Any = None
        self.labelled = True

    def add(self, inputs: Mapping[str, Any], items: Any) -> None:
        self.items = items
        labels = inputs.get(key := _label_key(inputs))
        if isinstance(labels, Tensor):
            self.counts.append(_counted(key, labels).sum())
        else:
            self.labelled = False

    def verify(self) -> None:
        if not self.labelled:
            if self.items is None:
                _warn(
                    "the batches carry no 'labels', so their tokens cannot be counted: "
                    + _MICRO_BATCHES_WEIGH_THE_SAME
                )
        elif self.items is not None:
            found, told = int(sum(self.counts)), float(torch.as_tensor(self.items))
            if found != told:
                _warn(
                    f"the first optimizer step's loss was divided by {told:g} tokens, but its "
                    f"micro-batches hold {found} labels, and its gradient is off by the ratio. "
                    "Does an overridden get_batch_samples, collator or training_step change either?"
                )


# ---- a loss of the user's own

_SCALED = "scaled by num_items_in_batch"
_TOKEN_MEAN = "the mean over the micro-batch's tokens"
_MEAN = "another mean over the micro-batch"
_UNKNOWN = "neither"
_SILENT = "nothing, or not a number: it tells nothing yet"
_VERDICTS = (_SCALED, _TOKEN_MEAN, _MEAN, _UNKNOWN, _SILENT)

_HOW = "Divide the sum of the token losses by num_items_in_batch, which the Trainer passes"


class _OwnLoss:
    """Stands before the `compute_loss` of a trainer whose loss is not the library's own, and
    corrects what it can prove of it.

    Such a loss ought to be ``sum / num_items_in_batch``, for the Trainer does not divide it again.
    Many are the mean over their own micro-batch: the gradient is then too large by the number of
    micro-batches, and these all weigh the same. Which it is shows in what it gives for the first
    micro-batch, under no_grad and with the same random numbers each time:

    - half as much for twice the count: it is as it should be, and left alone;
    - the same for twice the count, and without one ``n_A loss(A) + n_B loss(B) = n loss(A and B)``
      for the labels split in two: a mean over tokens, whatever of them it averages. Multiplied by
      ``n / num_items_in_batch`` it is exact;
    - the same, but not so: divided by the number of micro-batches its scale is right; that they
      weigh the same cannot be mended from here, and a warning says what to change;
    - anything else: the Trainer does as it would without us, and a warning says what to change.

    Two to five forward passes, once a training; a loss that is zero (a weight that is warmed up, a
    distance from the reference) or no number is asked again at the next micro-batch.
    """

    def __init__(self, trainer: Any, accepted: bool, note: Callable[[str, str], None]) -> None:
        self.trainer, self.accepted, self.note = trainer, accepted, note
        self.original = trainer.compute_loss
        self.verdict: str | None = None
        self.ignores_count = False

    def __call__(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **more: Any,
    ) -> Any:
        items, key = num_items_in_batch, _label_key(inputs)
        compute = partial(self.original, **more)
        if return_outputs or items is None or not model.training or key not in inputs:
            wanted = {"return_outputs": True} if return_outputs else {}
            return compute(model, inputs, num_items_in_batch=items, **wanted)
        if self.verdict is None:
            verdict = self._examine(compute, model, inputs, items)
            if verdict == _SILENT:  # the next micro-batch may tell
                return compute(model, inputs, num_items_in_batch=items)
            self.verdict = verdict
            self._tell()
        if self.verdict == _SCALED:
            return compute(model, inputs, num_items_in_batch=items)
        if self.verdict == _UNKNOWN:
            return self._as_stock(compute, model, inputs, items)
        n = _counted(key, inputs[key]).sum()  # before the loss takes the labels out
        if self.verdict == _TOKEN_MEAN and not n:
            # it adds nothing, but its mean is 0/0: of other labels it is a number
            inputs = {**inputs, key: _labels_to_try(inputs)[1]}
        mean = compute(model, inputs, num_items_in_batch=None)
        if self.verdict == _MEAN:
            return mean / self.trainer.current_gradient_accumulation_steps
        weight = n / torch.as_tensor(items, device=n.device) * self._processes()
        return torch.where(n > 0, mean * weight.to(mean.device), torch.zeros_like(mean))

    def _as_stock(self, compute: Callable[..., Any], model: Any, inputs: Any, items: Any) -> Any:
        """Uncounted, and then divided by the Trainer, where the flag is down."""
        trainer = self.trainer
        trainer.model_accepts_loss_kwargs = _stock_flag(trainer, self.accepted)
        counted = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func
        return compute(model, inputs, num_items_in_batch=items if counted else None)

    def _processes(self) -> int:
        """How many processes' tokens the count holds: DDP averages their gradients."""
        if not self.trainer.args.average_tokens_across_devices:
            return 1
        return self.trainer.accelerator.num_processes // self.trainer.get_tp_size()

    def _examine(
        self, compute: Callable[..., Any], model: Any, inputs: Mapping[str, Any], items: Any
    ) -> str:
        key, labels = _labels_to_try(inputs)

        def loss(labels: Tensor, items: Any) -> float:
            with self._undisturbed(), torch.no_grad():
                tried = {**inputs, key: labels.clone()}
                return float(compute(model, tried, num_items_in_batch=items))

        def follows() -> str:
            once, twice = loss(labels, items), loss(labels, items * 2)
            if once == 0 or not math.isfinite(once):
                return _SILENT
            if _equal(twice * 2, once):
                return _SCALED
            return _MEAN if _equal(twice, once) else _UNKNOWN

        def averages() -> str:
            parts = (labels, *_split(key, labels))
            n, a, b = (int(_counted(key, part).sum()) for part in parts)
            whole, first, rest = (loss(part, None) for part in parts)
            gap = abs(first - rest)  # a mean of anything else is off by a good part of it
            told = gap > 1e-3 * abs(whole)
            sums = abs(a * first + b * rest - n * whole) <= 1e-3 * gap * a * b / n
            return _TOKEN_MEAN if told and sums else _MEAN

        verdict = self._agreed(follows)
        self.ignores_count = verdict == _MEAN
        if verdict == _SCALED and self._processes() > 1:
            # Is it scaled for DDP's mean over the processes too? Weighed by us it is, if it can be.
            return _TOKEN_MEAN if self._agreed(averages) == _TOKEN_MEAN else _SCALED
        return self._agreed(averages) if verdict == _MEAN else verdict

    def _agreed(self, question: Callable[[], str]) -> str:
        """The answer, if every process gives the same: they must go on alike."""
        try:
            answer = question()
        except Exception as error:  # the real call, with the real numbers, is not guarded
            logger.warning("the loss of %s could not be tried out: %r", _name(self.trainer), error)
            answer = _UNKNOWN
        if self.trainer.accelerator.num_processes == 1:
            return answer
        mine = torch.tensor([_VERDICTS.index(answer)], device=self.trainer.args.device)
        answers = self.trainer.accelerator.gather(mine).tolist()
        if _VERDICTS.index(_SILENT) in answers:
            return _SILENT
        return answer if len(set(answers)) == 1 else _UNKNOWN

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Each trial draws the same random numbers (dropout), training those it would have drawn;
        what TRL sums up for its logs stays as it was.
        """
        state = vars(self.trainer)
        sums = ("_metrics", "_total_train_tokens")
        kept = {name: copy.deepcopy(state[name]) for name in sums if name in state}
        cards = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(list(cards)):
            torch.manual_seed(0)
            try:
                yield
            finally:
                state.update(kept)

    def _tell(self) -> None:
        name = _name(self.trainer)
        if self.verdict == _TOKEN_MEAN and self.ignores_count:
            text = (
                f"{name} gives the mean over each micro-batch's tokens and ignores "
                "num_items_in_batch; the micro-batches are weighed by their tokens"
            )
            logger.warning("%s.", text)
        elif self.verdict == _MEAN:
            text = f"{name} is divided by the number of micro-batches, which all weigh the same"
            _warn(
                f"{name} ignores num_items_in_batch and does not show to be a mean over tokens, so "
                "its micro-batches cannot be weighed by their tokens. It is divided by their "
                f"number: the scale is right, but they all weigh the same. {_HOW}, or set "
                "loss_is_scaled_for_ga = False on the Trainer if this is what you want."
            )
        elif self.verdict == _UNKNOWN:
            text = f"{name} could not be proven right or wrong and is left as it is"
            _warn(
                f"{name} neither follows num_items_in_batch nor ignores it, so how it weighs "
                "tokens under gradient accumulation is unknown, and it is left as it is. "
                f"{_HOW}, or set "
                "loss_is_scaled_for_ga on the Trainer: True where the loss is scaled for the whole "
                "optimizer step, False where it is the mean over one micro-batch."
            )
        else:
            return
        self.note("gradient accumulation", text)


def _equal(a: float, b: float) -> bool:
    """Wider than sums in another order differ, and far closer than a factor of two."""
    return abs(a - b) <= 1e-4 * max(abs(a), abs(b))


def _labels_to_try(inputs: Mapping[str, Any]) -> tuple[str, Tensor]:
    """The micro-batch's labels; all its tokens where too few are labelled to tell means apart."""
    labels = inputs[key := _label_key(inputs)]
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    few = int(_counted(key, labels).sum()) < 3
    if few and isinstance(ids, Tensor) and ids.shape == labels.shape:
        padded = isinstance(mask, Tensor) and mask.shape == ids.shape
        labels = ids.masked_fill(mask == 0, IGNORED) if padded else ids  # type: ignore[arg-type]
    return key, labels


def _split(key: str, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The labels of the first third of the counted tokens, and those of the others: an uneven cut
    through the rows, so that a mean of rows is not taken for one of tokens.
    """
    counted = _counted(key, labels)
    order = counted.flatten().cumsum(0).view_as(labels)
    first = counted & (order <= order.max() // 3)
    return labels.masked_fill(counted & ~first, IGNORED), labels.masked_fill(first, IGNORED)


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
    if not hasattr(model, "peft_config") or _gemma4(model) is None:
        return []
    if any(map(_checkpoints_reentrantly, modules)):
        return []
    undos = []
    for module in modules:
        hooks = module._forward_hooks
        forcing = {key: hook for key, hook in hooks.items() if _forces_grad(hook)}
        if forcing:
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
    name = getattr(hook, "__name__", "")
    home = (getattr(hook, "__module__", None) or "").split(".")[0]
    return name.startswith("make_inputs_require_grad") and home in ("transformers", "peft", "trl")
