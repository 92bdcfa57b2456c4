"""How much of a difference is too much: what nudged runs of the stock model differ by, times four.

The package's docstring says why. A quantity goes by its name, the ``key``: it is the loss, the
gradient of something, or else an output.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from gemma_accel.models import text_model
from gemma_accel.verification.result import NOTHING, Measure

__all__ = [
    "EVERY_GRADIENT",
    "INFINITE",
    "SORTS",
    "Judge",
    "Precision",
    "relative_errors",
    "worst_of",
]

MULTIPLE = 4
"""How many times the nudged runs' difference is allowed: see the package's docstring."""

SORTS = ("loss", "output", "gradient")
EVERY_GRADIENT = "gradient of everything"
INFINITE = torch.full((3,), float("inf"), dtype=torch.float64)
_STATISTICS = ("2-norm", "largest element", "along stock's value")
# in units in the last place: a rounding is at most half of one, and averages out along a value
_FLOORS = torch.tensor([1.0, 2.0, 0.25], dtype=torch.float64)


class Precision:
    """What the model computes in: the coarsest dtype that was met.

    Attributes:
        unit: a unit in its last place, relative.
        loss_scale: what the loss is multiplied with before its backward.
    """

    def __init__(self, base: nn.Module) -> None:
        self.unit = torch.finfo(torch.float32).eps
        self.loss_scale = 1.0
        self._met: set[torch.dtype] = set()
        self.meet(text_model(base).embed_tokens.weight.dtype)
        for module in base.modules():
            if (dtype := getattr(module, "compute_dtype", None)) is not None:  # an NF4 layer's
                self.meet(dtype)

    def meet(self, dtype: torch.dtype) -> None:
        if dtype in self._met:
            return  # its loss scale may have been given up since
        self._met.add(dtype)
        self.unit = max(self.unit, torch.finfo(dtype).eps)
        if dtype is torch.float16:
            self.loss_scale = 128.0  # as a scaler would: float16 has no small gradients


class Judge:
    """Learns from nudged runs what rounding may do to each quantity, and measures errors by it."""

    def __init__(self, precision: Precision, rtol: float | None) -> None:
        self.precision, self.rtol = precision, rtol
        self._noise: dict[str, Tensor] = {}

    def learn(self, errors: dict[str, Tensor], probe: str) -> None:
        """From the errors of a nudged run, by key."""
        for key, error in errors.items():
            kind = _kind(key, probe)
            self._noise[kind] = torch.maximum(self._noise.get(kind, error), error)

    def measure(self, key: str, error: Tensor, probe: str) -> tuple[str, Measure]:
        """The sort of the quantity, and its statistic that comes closest to its budget."""
        budget = self._budget(key, error, probe)
        worst = int((error / budget).nan_to_num(nan=float("inf")).argmax())
        where = f"{key} ({probe}), {_STATISTICS[worst]}"
        return _sort(key), Measure(error[worst].item(), budget[worst].item(), where)

    def _budget(self, key: str, error: Tensor, probe: str) -> Tensor:
        if self.rtol is not None:
            return torch.full_like(error, self.rtol)
        floor = self.precision.unit * _FLOORS + 32 * torch.finfo(torch.float32).eps
        noise = self._noise.get(_kind(key, probe), torch.zeros_like(error))
        # where it is one number, the nudged runs' may happen to lie close to stock's
        single = 2 if key in ("loss", EVERY_GRADIENT) else 1
        return torch.maximum(single * MULTIPLE * noise, floor)


def worst_of(found: list[tuple[str, Measure]], sort: str) -> Measure:
    """Of this sort: what came closest to its budget, or went furthest over it."""
    return max((measure for of, measure in found if of == sort), key=_ratio, default=NOTHING)


def _ratio(measure: Measure) -> float:
    ratio = measure.error / measure.budget if measure.budget else float("inf")
    return ratio if ratio == ratio else float("inf")


def _kind(key: str, probe: str) -> str:
    """Quantities that share a budget: the same one of every layer. But for all gradients as one,
    which of a few tokens are many times as noisy as of many.
    """
    return f"{key} ({probe})" if key == EVERY_GRADIENT else re.sub(r"\.\d+\b", ".#", key)


def _sort(key: str) -> str:
    if key == "loss":
        return "loss"
    return "gradient" if key.startswith("gradient") else "output"


def relative_errors(ours: Tensor, stock: Tensor, *, activations: bool) -> Tensor:
    """Relative difference, float64 [3]: 2-norm, largest element, part along ``stock``.

    On their device: whoever reads it waits for the device. What is not finite is infinite.

    The last is asked of activations [..., D] and their gradients. Random errors have such a part
    too: if each token's are its own, 1/sqrt(n) of their size, n being the tokens that matter (a
    gradient may be ruled by few: n is the participation ratio of their squares). Four times that is
    taken off. A parameter's gradient is a sum over tokens, so nothing is known of its share.
    """
    s = stock.double()
    d = ours.double() - s
    squares = s.square().sum(-1).flatten() if activations else s.square().sum().view(1)
    size = squares.sum().sqrt()  # where that is zero, 0/0 below is set right in the end
    norm = torch.linalg.vector_norm(d) / size
    along = norm * 0
    if activations:
        chance = squares.square().sum().sqrt() / squares.sum()
        along = ((d * s).sum().abs() / size**2 - 4 * norm * chance).clamp_min(0)
    errors = torch.stack((norm, d.abs().max() / s.abs().max(), along))
    errors = errors.nan_to_num(nan=float("inf"))
    return errors.masked_fill((size == 0) & ~d.any(), 0.0)
