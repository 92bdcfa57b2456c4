"""verify(): does this model, on this card, train the same with the patches as without?

The model itself is the reference: a second one would not fit an 8 GB card. Its patches are taken
out, a small batch runs stock, and then the patches come back one after the other, in the order in
which `apply` installs them; after each the batch runs again. A patch after which something is off
is named, taken out again, and the next is tried without it. Layers do not depend on one another in
these runs (see below), so of the text layers that are of one kind the first and the last are enough
to try a patch on, by one text (a second, labelled one is for the head and the loss, and has only
those layers ever, in stock's runs too). With all patches in, every layer is looked at; only if
something is off then are the patches tried again on all of them.

*What is compared.* Two runs in bfloat16 drift apart layer by layer until a fault of a few per cent
drowns, so a patched run is brought back on course at every layer: the stock run's hidden state is
what enters it, and the stock run's gradient is what enters its backward. What a layer makes of them
(its output, its attention's, its MLP's, the gradient it hands down and its parameters') then
differs by that layer's own rounding alone. The loss is compared in a run that is left to itself,
and so are the gradients, as one vector, with all patches in.

*The budget.* Stock is nudged: the same runs, with every hidden state and gradient that enters a
layer moved by up to half a unit in the last place of the dtype that the model computes in. What
that changes is what rounding alone can do to each quantity. Two correct computations round
independently, so they differ by sqrt(2) times one's own error, and the largest of many errors
spreads by about 2 from draw to draw: a patched run may differ by 4 times the nudged runs' largest
difference. Layers of one kind share their budget. Three numbers are held so: the difference's
2-norm, its largest element, and its part along stock's own value, which random rounding does not
have and a wrong factor does. Where nudging moves nothing, a unit in the last place is allowed.

*Where to read on.* `comparison` has the runs in their order, and uses everything else: `batches`
makes what goes in, `runs` is one pass and what is recorded or compared in it, `stations` where in
the model that is looked at, `judgement` how much of a difference is too much. `installation` takes
patches out and puts them in, `borrowing` gives the rest of the model back as it was, and `result`
is what comes out.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from torch import nn

from gemma_accel.models import base_model, model_device, text_model
from gemma_accel.patching import report_of
from gemma_accel.verification.batches import make_probes
from gemma_accel.verification.borrowing import (
    adapters_awake,
    attributes_kept,
    checkpoint_layers,
    gradients_aside,
)
from gemma_accel.verification.comparison import Comparison
from gemma_accel.verification.installation import Installation
from gemma_accel.verification.result import (
    EVERYTHING,
    Measure,
    Row,
    Verification,
    VerificationError,
)

__all__ = [
    "EVERYTHING",
    "Measure",
    "Row",
    "Verification",
    "VerificationError",
    "verify",
    "verify_before_training",
]


def verify(model: Any, *, rtol: float | None = None) -> Verification:
    """Run a small batch through the model patched and stock, and compare, patch by patch.

    Args:
        model: what `apply` takes, applied or not: where it is not, the patches that `apply` would
            install are tried. It is left exactly as it was.
        rtol: a relative difference to allow everywhere, instead of the budget that is measured.

    Returns:
        A `Verification`: ``.ok``, ``.rows``, ``.guilty``; `print` it.

    Raises:
        UnsupportedModelError, ForeignPatchError: as `apply`.
        VerificationError: somebody wrapped a patched module, so the stock model cannot be had; or
            the stock model's own loss or gradients are not finite.
    """
    base = base_model(model)
    installation = Installation(base)
    device = model_device(base)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(attributes_kept(model))
        stack.enter_context(installation)
        stack.enter_context(gradients_aside(model))
        stack.enter_context(adapters_awake(model))
        nn.Module.train(model)  # the model's own `train` may remember in which mode it was last
        if device.type == "cuda":
            # stock's activations of this batch, all kept, would not fit an 8 GB card
            checkpoint_layers(text_model(base))
            stack.callback(torch.cuda.empty_cache)
        probes, notes = make_probes(model, base, device)
        return Verification(Comparison(model, installation, probes, rtol).rows(), notes)


def verify_before_training(trainer: Any) -> Verification | None:
    """`verify` as the first step of a run, where ``GEMMA_ACCEL_VERIFY=1`` asks for it.

    Raises:
        VerificationError: the patched model does not agree with stock; names the patch.
    """
    if os.environ.get("GEMMA_ACCEL_VERIFY", "0") in ("", "0"):
        return None
    accelerator = getattr(trainer, "accelerator", None)
    with accelerator.autocast() if accelerator is not None else contextlib.nullcontext():
        result = verify(trainer.model)
    if not result.ok:
        raise VerificationError(_refusal(result))
    if (report := report_of(trainer.model)) is not None:
        tried = sum(row.tried for row in result.rows)
        report.note("verified", f"{tried} comparisons with stock, all within rounding")
    return result


def _refusal(result: Verification) -> str:
    names = ", ".join(repr(name) for name in result.guilty if name != EVERYTHING)
    remedy = (
        f"Leave out {names} (apply(patches=[...]) takes the names of those to install)"
        if names
        else "Train without gemma_accel (GEMMA_ACCEL_DISABLE=1)"
    )
    return (
        f"with {names or 'all patches in'} the model does not train as stock does; nothing was "
        f"trained. {remedy}, and report this with the table:\n{result}"
    )
