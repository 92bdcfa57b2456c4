"""Whose loss a Trainer minimises, and how it is divided under gradient accumulation.

The gradient of an optimizer step should be that of ``sum of the token losses / labelled tokens``
over all its micro-batches. Transformers sees to that only where the model says
`accepts_loss_kwargs`: then the Trainer counts the tokens of the window and hands the count,
`num_items_in_batch`, to the loss. `Gemma4ForConditionalGeneration` says no although its loss takes
the count, so each micro-batch is averaged on its own and a short one outweighs a long one: with 3,
60, 8 and 40 labelled tokens the gradient is off by as much as its own length, while the logged loss
looks right. The flag is read once, when the Trainer is built; after that only the Trainer's copy of
it counts.

A loss of the user's own (`compute_loss_func`, an overridden `compute_loss`) is tried out on the
first micro-batch before anything is corrected: see `OwnLoss`. `gemma_accel.callback` does what is
found here to be right.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import unwrap_peft_model

from gemma_accel.hookspecs import Undo
from gemma_accel.inputs import IGNORED
from gemma_accel.patches.seams import home_of, set_attribute
from gemma_accel.trials import untouched

__all__ = [
    "MICRO_BATCHES_WEIGH_THE_SAME",
    "REMEDY",
    "STEP_REMEDY",
    "OwnLoss",
    "Window",
    "accept_loss_kwargs",
    "count_tokens",
    "gemma4",
    "has_own_loss",
    "name_of",
    "reads_embeddings",
    "sees_to_itself",
    "steps_by_itself",
    "stock_flag",
    "warn",
    "warn_without_trainer",
]

logger = logging.getLogger(__name__)


def accept_loss_kwargs(base: nn.Module) -> Undo:
    """Let the Trainers built on ``base`` hand it the window's token count; returns the undo.

    Nothing happens where the model accepts it already, or where its class does not say (the Trainer
    then finds out by itself).
    """
    if getattr(base, "accepts_loss_kwargs", True):
        return lambda: None
    return set_attribute(base, "accepts_loss_kwargs", True)


# ---- whose loss it is, and whether the Trainer counts tokens for it

MICRO_BATCHES_WEIGH_THE_SAME = (
    "under gradient accumulation each micro-batch is averaged on its own, so a token of a short "
    "one weighs more than a token of a long one."
)
STEP_REMEDY = (
    "Let it end in super().training_step(model, inputs, num_items_in_batch), or set "
    "loss_is_scaled_for_ga on the Trainer: True where its loss is scaled for the whole optimizer "
    "step, False where it is the mean over one micro-batch."
)
REMEDY = (
    "Call gemma_accel.apply(model) before the Trainer is built, or "
    "GradientAccumulationCallback().attach(trainer) before it trains."
)


def gemma4(model: Any) -> nn.Module | None:
    """The Gemma 4 language model in ``model`` (the unified one too): its loss takes the count."""
    base = unwrap_peft_model(model)
    for cls in type(base).__mro__:
        if cls.__module__.startswith("transformers.models.gemma4"):
            speaks = cls.__name__.endswith(("ForConditionalGeneration", "ForCausalLM"))
            return base if speaks else None
    return None


def _base(trainer: Any) -> nn.Module:
    return unwrap_peft_model(trainer.accelerator.unwrap_model(trainer.model))


def count_tokens(trainer: Any) -> bool:
    """Have ``trainer`` count tokens for its loss. False where that is not ours to decide."""
    if _says_how_it_scales(trainer):
        if not hasattr(Trainer, "loss_is_scaled_for_ga") and not _is_trls(trainer):
            # transformers < 5.19 does not read it; TRL sees to that for its own trainers
            trainer.model_accepts_loss_kwargs = bool(trainer.loss_is_scaled_for_ga)
        return False
    if sees_to_itself(trainer) or gemma4(_base(trainer)) is None or steps_by_itself(trainer):
        return False
    trainer.model_accepts_loss_kwargs = True
    return True


def stock_flag(trainer: Any, accepted: bool) -> bool:
    """What ``model_accepts_loss_kwargs``, ``accepted`` before, is without `apply`."""
    return accepted and getattr(type(_base(trainer)), "accepts_loss_kwargs", True)


def steps_by_itself(trainer: Any) -> bool:
    """Whether a `training_step` of its own stands between the count and the loss: a user's that
    does not end in the Trainer's, and may divide the loss by itself, or one of TRL's beyond SFT's,
    which may train on other labels than the data has (GKD's does).
    """
    step = type(trainer).training_step
    if (home := home_of(step)) == "trl":
        return not step.__qualname__.startswith("SFTTrainer.")
    code = getattr(step, "__code__", None)
    return home != "transformers" and (code is None or "training_step" not in code.co_names)


def _says_how_it_scales(trainer: Any) -> bool:
    """As the classes of TRL do for DPO, KTO, rewards, GRPO and others."""
    return getattr(trainer, "loss_is_scaled_for_ga", None) is not None


def sees_to_itself(trainer: Any) -> bool:
    """Whether the Trainer has a normalisation of its own (under sequence parallelism it has)."""
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    return _says_how_it_scales(trainer) or (
        parallel is not None and parallel.sp_backend == "deepspeed" and bool(parallel.sp_enabled)
    )


def _is_trls(trainer: Any) -> bool:
    return any(cls.__module__.startswith("trl.") for cls in type(trainer).__mro__)


def reads_embeddings(trainer: Any) -> bool:
    """Whether code of a user's own may ask for a gradient there: of its loss, or its steps."""
    step = home_of(type(trainer).training_step)
    return step not in ("transformers", "trl") or has_own_loss(trainer)


def has_own_loss(trainer: Any) -> bool:
    """Whether anything but Transformers' and TRL's own code computes the loss."""
    return (
        home_of(trainer.compute_loss) not in ("transformers", "trl")
        or callable(trainer.compute_loss_func)
        or "_loss_function" in vars(_base(trainer))
    )


def warn_without_trainer(args: Any, model: Any) -> None:
    base = unwrap_peft_model(model)
    if args.gradient_accumulation_steps > 1 and not getattr(base, "accepts_loss_kwargs", True):
        warn(
            f"{type(base).__name__} says accepts_loss_kwargs=False: "
            f"{MICRO_BATCHES_WEIGH_THE_SAME} This callback was not given its trainer and cannot "
            f"correct it. {REMEDY}"
        )


def name_of(trainer: Any) -> str:
    function = trainer.compute_loss_func
    if callable(function):
        return f"compute_loss_func {getattr(function, '__name__', type(function).__name__)!r}"
    return type(trainer).__name__


def warn(message: str) -> None:
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


class Window:
    """The first optimizer step's labels against the count that its loss was divided by: whatever
    comes between the data loader and the loss shows. One synchronisation, once a training.
    """

    def __init__(self) -> None:
        self.counts: list[Tensor] = []
        self.items: Any = None
        self.labelled = True
        self._last: Tensor | None = None

    def meet(self, inputs: Mapping[str, Any], items: Any) -> None:
        """A loss is about to be computed; of a step that computes several, the last counts."""
        self.items = items
        labels = inputs.get(key := _label_key(inputs))
        self._last = _counted(key, labels).sum() if isinstance(labels, Tensor) else None

    def step_ended(self) -> None:
        """A micro-batch is through."""
        if self._last is None:
            self.labelled = False
        else:
            self.counts.append(self._last)
        self._last = None

    def verify(self) -> None:
        if not self.labelled:
            if self.items is None:
                warn(
                    "the batches carry no 'labels', so their tokens cannot be counted: "
                    + MICRO_BATCHES_WEIGH_THE_SAME
                )
        elif self.items is not None:
            found, told = int(sum(self.counts)), float(torch.as_tensor(self.items))
            if found != told:
                warn(
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


class OwnLoss:
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
        trainer.model_accepts_loss_kwargs = stock_flag(trainer, self.accepted)
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
            logger.warning(
                "the loss of %s could not be tried out: %r", name_of(self.trainer), error
            )
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
        what the trainer and the loss sum up for their logs stays as it was.
        """
        cards = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        loss = self.trainer.compute_loss_func
        owner = loss.__self__ if isinstance(loss, MethodType) else loss
        with torch.random.fork_rng(list(cards)), untouched(self.trainer, owner):
            torch.manual_seed(0)
            yield

    def _tell(self) -> None:
        name = name_of(self.trainer)
        if self.verdict == _TOKEN_MEAN and self.ignores_count:
            text = (
                f"{name} gives the mean over each micro-batch's tokens and ignores "
                "num_items_in_batch; the micro-batches are weighed by their tokens"
            )
            logger.warning("%s.", text)
        elif self.verdict == _MEAN:
            text = f"{name} is divided by the number of micro-batches, which all weigh the same"
            warn(
                f"{name} ignores num_items_in_batch and does not show to be a mean over tokens, so "
                "its micro-batches cannot be weighed by their tokens. It is divided by their "
                f"number: the scale is right, but they all weigh the same. {_HOW}, or set "
                "loss_is_scaled_for_ga = False on the Trainer if this is what you want."
            )
        elif self.verdict == _UNKNOWN:
            text = f"{name} could not be proven right or wrong and is left as it is"
            warn(
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
