"""The one rule by which a result counts as accurate.

Truth is the same computation in float32 or float64. Stock PyTorch at the test's dtype sets the
error budget; ours has to fit in it. Errors are relative, in the 2-norm and in the largest element,
so neither a widespread nor a single wrong element passes.

Slack. Two correct computations that round in a different order make different errors of the same
size. The 2-norm of n independent rounding errors has a relative spread of about 1/sqrt(2n), so for
large n the norms agree to a few per cent: 5 % plus 4/sqrt(2n), four standard deviations. The
largest of n errors spreads more (its distribution is that of an extreme value, whose spread falls
only like 1/log n): a factor of 2 there. And where stock happens to be exact (one rounding, planted
data), one unit in the last place of the dtype is allowed: ours cannot be asked to beat the format.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def relative_errors(x: Tensor, truth: Tensor) -> tuple[float, float]:
    """2-norm and max-norm of ``x - truth`` over those of ``truth``, in float64. NaN anywhere is
    NaN.
    """
    d, t = (x.double() - truth.double()), truth.double()
    if x.numel() == 0:
        return 0.0, 0.0
    scale_2 = t.norm().item() or 1.0
    scale_max = t.abs().max().item() or 1.0
    return d.norm().item() / scale_2, d.abs().max().item() / scale_max


def assert_no_less_accurate(
    ours: Tensor, stock: Tensor, truth: Tensor, *, what: str, reduced: int = 1
) -> None:
    """Ours errs no more than stock against ``truth``.

    ``reduced`` is the number of terms summed into one element (a dot product's length): a float32
    sum of that many terms may differ by about ``sqrt(reduced)`` units in the last place of float32
    in either implementation, which matters only where the dtype under test is float32 itself.
    """
    assert ours.shape == truth.shape, (
        f"{what}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    )
    assert ours.dtype == stock.dtype, f"{what}: dtype {ours.dtype}, stock gives {stock.dtype}"
    (ours_2, ours_max), (stock_2, stock_max) = (
        relative_errors(ours, truth),
        relative_errors(stock, truth),
    )
    n = max(ours.numel(), 1)
    # a rounding error is at most half a unit in the last place, eps/2 relative; its rms over a
    # binade is about eps/4
    unit = torch.finfo(ours.dtype).eps
    sums = math.sqrt(reduced) * torch.finfo(torch.float32).eps
    budget_2 = max(stock_2 * (1.05 + 4 / math.sqrt(2 * n)), unit / 2) + sums
    budget_max = max(stock_max * 2, unit / 2) + 4 * sums
    assert ours_2 <= budget_2, (
        f"{what}: relative error {ours_2:.3e}, stock's {stock_2:.3e}, budget {budget_2:.3e}"
    )
    assert ours_max <= budget_max, (
        f"{what}: largest error {ours_max:.3e}, stock's {stock_max:.3e}, budget {budget_max:.3e} "
        "(relative to the largest)"
    )


def assert_same_but_for_rounding(x: Tensor, y: Tensor, *, what: str) -> None:
    """The same arithmetic, compiled for other arguments: multiplies and adds may be contracted, and
    sums associated, otherwise. 2-norms within four units in the last place.
    """
    assert x.dtype == y.dtype and x.shape == y.shape, f"{what}: {x.dtype} {tuple(x.shape)}"
    error, _ = relative_errors(x, y)
    budget = 4 * torch.finfo(x.dtype).eps
    assert error <= budget, f"{what}: apart by {error:.3e}, budget {budget:.3e}"
