"""What is compared, and the gate: no time of an op whose result is not right.

A `Case` is an op at one shape. It makes the stacks' calls, each one forward and backward on inputs
of its own, all with the same numbers: ``stock`` (the lines of transformers or PEFT that the op
replaces), ``ours``, ``liger`` where it has the op, and ``truth``, which is stock's computation in
float64 (attention: the reference in float32).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.accuracy import assert_no_less_accurate

Results = dict[str, Tensor]
Call = Callable[[], Results]


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    op: str
    shape: str
    make: Callable[[str, torch.dtype], dict[str, Call]]
    """From a device and a dtype to the calls, by stack."""
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    moved: int | None = None
    """Bytes that have to be read and written at least, forward and backward."""
    flops: float | None = None
    liger: bool = False
    reduced: int = 1
    """The longest sum behind one element: see `assert_no_less_accurate`."""
    to_the_bit: bool = False
    """Whether ours has to equal stock: copies and table look-ups."""

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape}"

    @property
    def stacks(self) -> tuple[str, ...]:
        return ("stock", "ours", *(["liger"] if self.liger else []))

    def calls(self) -> dict[str, Call]:
        torch.manual_seed(0)
        return self.make(self.device, self.dtype)


def call(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: dict[str, Tensor],
    grads: list[Tensor],
    wanted: tuple[str, ...],
    dtype: torch.dtype | None = None,
    more: dict[str, Tensor] | None = None,
) -> Call:
    """A call of ``function(**inputs)`` and of its backward for the ``wanted`` inputs, and for the
    parameters ``more`` that it reads by itself. With ``dtype``, on inputs of that dtype.
    """
    own = {
        k: v.detach().to(dtype or v.dtype, copy=True) if v.is_floating_point() else v
        for k, v in inputs.items()
    }
    leaves = {f"d{k}": own[k].requires_grad_() for k in wanted}
    leaves |= {f"d{k}": v for k, v in (more or {}).items()}

    def run() -> Results:
        out = function(**own)
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]
        results = {f"y{i}": o for i, o in enumerate(outs)}
        if not leaves:
            return results
        pairs = [(o, g) for o, g in zip(outs, grads, strict=False) if o.requires_grad]
        outs, gs = zip(*((o, g.to(o.dtype)) for o, g in pairs), strict=True)
        return results | dict(
            zip(leaves, torch.autograd.grad(outs, list(leaves.values()), gs), strict=True)
        )

    return run


def calls(
    inputs: dict[str, Tensor],
    grads: list[Tensor],
    wanted: tuple[str, ...],
    *,
    stock: Callable[..., object],
    ours: Callable[..., object],
    liger: Callable[..., object] | None = None,
) -> dict[str, Call]:
    """The stacks' calls of functions that take the same inputs."""
    made = {
        "stock": call(stock, inputs, grads, wanted),
        "ours": call(ours, inputs, grads, wanted),
        "truth": call(stock, inputs, grads, wanted, torch.float64),
    }
    if liger is not None:
        made["liger"] = call(liger, inputs, grads, wanted)
    return made


def fault(case: Case) -> str | None:
    """What is wrong with our op on this case's inputs, if anything: it has to be no less accurate
    than stock against the truth, output by output and gradient by gradient.
    """
    made = case.calls()
    try:
        ours, stock = made["ours"](), made["stock"]()
        if case.to_the_bit:
            truth = stock
            unequal = [k for k in stock if not torch.equal(ours[k], stock[k])]
            assert not unequal, f"{', '.join(unequal)}: not equal to stock's"
        else:
            truth = made["truth"]()
        assert ours.keys() == stock.keys() == truth.keys() and ours
        for name in ours:
            assert_no_less_accurate(
                ours[name], stock[name], truth[name], what=name, reduced=case.reduced
            )
    except Exception as error:
        return f"{case.name}: {type(error).__name__}: {error}".replace("AssertionError: ", "")
    return None
