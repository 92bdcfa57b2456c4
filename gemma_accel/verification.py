"""verify(): does this model, on this card, train the same with the patches as without?

The model itself is the reference: a second one would not fit an 8 GB card. Its patches are taken
out, a small batch runs stock, and then the patches come back one after the other, in the order in
which `apply` installs them; after each the batch runs again. A patch after which something is off
is named, taken out again, and the next is tried without it. Layers do not depend on one another in
these runs (see below), so of the text layers that are of one kind the first and the last are enough
to try a patch on. With all patches in, every layer is looked at; only if something is off then are
the patches tried again on all of them.

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
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import re
import weakref
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4AudioLayer,
    Gemma4TextDecoderLayer,
    Gemma4VisionEncoderLayer,
)

from gemma_accel.budget import memory_budget
from gemma_accel.errors import BudgetError, GemmaAccelError
from gemma_accel.hookspecs import Patch, Undo
from gemma_accel.memory import HEAD_TILE, Arrangement, Mode, layer_shapes
from gemma_accel.models import base_model, model_device, text_model
from gemma_accel.patches.checkpointing import checkpointing_patch, graphs_patch
from gemma_accel.patches.graphs import STEADY
from gemma_accel.patches.per_layer import HostPerLayerEmbedding
from gemma_accel.patches.seams import Fused
from gemma_accel.patching import _at, _candidates, _refuse_foreign, registry, report_of
from gemma_accel.report import Report

__all__ = [
    "Measure",
    "Row",
    "Verification",
    "VerificationError",
    "verify",
    "verify_before_training",
]

MULTIPLE = 4
"""How many times the nudged runs' difference is allowed: see the module's docstring."""

DRAWS = 2
"""Nudged runs. Each gives a number a layer; layers of a kind are pooled."""

EVERYTHING = "all together"

CORRECTIONS = frozenset({"audio_eager_mask"})
"""Patches that differ from stock on purpose, which is wrong there: they are in from the start."""


class VerificationError(GemmaAccelError):
    """The patched model does not train as the stock model does, or that cannot be found out."""


# --- what comes out -----------------------------------------------------------------------------


class Measure(NamedTuple):
    """The quantity that came closest to its budget, or went furthest over it."""

    error: float
    budget: float
    where: str

    @property
    def ok(self) -> bool:
        return self.error <= self.budget


_NOTHING = Measure(0.0, 0.0, "")


@dataclasses.dataclass(frozen=True)
class Row:
    """One patch, tried on top of those before it that were found good.

    Attributes:
        places: in how many modules it sits.
        loss: relative difference of the loss; with all patches in, of a run left to itself too.
        output: worst relative difference of a layer's or block's output, from stock's input.
        gradient: worst relative difference of a gradient, from stock's input and gradient.
        reason: why it failed or could not be tried, where the numbers do not say it.
        note: why it was not compared, where that is as it should be.
    """

    patch: str
    modality: str
    places: int
    loss: Measure = _NOTHING
    output: Measure = _NOTHING
    gradient: Measure = _NOTHING
    reason: str = ""
    note: str = ""
    tried: bool = True

    @property
    def loss_error(self) -> float:
        return self.loss.error

    @property
    def gradient_error(self) -> float:
        return self.gradient.error

    @property
    def budget(self) -> float:
        """The budget of the worst gradient."""
        return self.gradient.budget

    @property
    def ok(self) -> bool:
        return not self.reason and self.loss.ok and self.output.ok and self.gradient.ok


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify` found: print it.

    Attributes:
        rows: one a patch, in the order of installation, and a last one for all of them together.
        notes: what was not looked at, and why.
    """

    rows: list[Row]
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    @property
    def guilty(self) -> list[str]:
        """The patches with which the model no longer does what stock does, the first one first."""
        return [row.patch for row in self.rows if row.tried and not row.ok]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists and dictionaries, ready for JSON."""
        rows = []
        for row in self.rows:
            entry = {**dataclasses.asdict(row), "ok": row.ok}
            for name in ("loss", "output", "gradient"):
                entry[name] = getattr(row, name)._asdict()
            rows.append(entry)
        return {"ok": self.ok, "guilty": self.guilty, "rows": rows, "notes": self.notes}

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=120, force_terminal=False, force_jupyter=False).print(self)
        return out.getvalue().rstrip()

    def __rich_console__(self, console: Any, options: Any) -> Any:
        from rich.table import Table

        table = Table(title="patched against stock", title_justify="left")
        for column in ("patch", "places", "loss", "outputs", "gradients", ""):
            table.add_column(column, justify="right" if column == "places" else "left")
        for row in self.rows:
            if not row.tried:
                table.add_row(row.patch, str(row.places), "", "", "", row.reason or row.note)
                continue
            cells = [_cell(m) for m in (row.loss, row.output, row.gradient)]
            verdict = "ok" if row.ok else f"WRONG: {row.reason or _worst(row).where}"
            table.add_row(row.patch, str(row.places), *cells, verdict)
        yield table
        yield "each cell: relative difference / what rounding alone may do"
        yield from self.notes


def _cell(measure: Measure) -> str:
    return f"{measure.error:.1e} / {measure.budget:.1e}" if measure.where else "-"


def _worst(row: Row) -> Measure:
    return next((m for m in (row.output, row.gradient, row.loss) if not m.ok), row.output)


# --- verify -------------------------------------------------------------------------------------


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
    patches = _Patches(base)
    device = model_device(base)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_kept(model))
        stack.enter_context(patches)
        stack.enter_context(_gradients_aside(model))
        stack.enter_context(_adapters_awake(model))
        nn.Module.train(model)  # the model's own `train` may remember in which mode it was last
        if device.type == "cuda":
            # stock's activations of this batch, all kept, would not fit an 8 GB card
            _checkpoint(text_model(base))
            stack.callback(torch.cuda.empty_cache)
        probes, notes = _probes(model, base, device)
        return Verification(_Comparison(model, patches, probes, rtol).rows(), notes)


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


class _Comparison:
    """The runs of one `verify`, in their order."""

    def __init__(
        self,
        model: Any,
        patches: _Patches,
        probes: list[_Probe],
        rtol: float | None,
    ) -> None:
        self.model, self.patches, self.stations = model, patches, _Stations(patches.base)
        self.probes, self.rtol = probes, rtol
        self.noise: dict[str, Tensor] = {}
        self.spared = _spared(text_model(patches.base))
        self.trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]

    def rows(self) -> list[Row]:
        self.patches.take_out()
        self._record()
        self._measure_noise()
        rows = self._one_by_one()
        if not all(row.ok for row in rows):
            return rows
        self.patches.put_back()
        places = len(self.patches.places)
        together = self._attempt(EVERYTHING, "", places, lambda: self._found(self.probes))
        if together.ok or not self.spared:
            return [*rows, together]
        self.spared = []
        self.patches.take_out()
        rows = self._one_by_one()
        return rows if not all(row.ok for row in rows) else [*rows, together]

    def _one_by_one(self) -> list[Row]:
        rows = []
        bad: set[str] = set()
        for patch in self.patches.in_order():
            row = self._try(patch, bad)
            if not row.ok:
                bad.add(patch.name)
            rows.append(row)
        return rows

    def _record(self) -> None:
        """The stock runs, which everything else is compared with."""
        for probe in self.probes:
            self._run(probe, "record")
            wrong = probe.not_finite()
            if wrong and self.stations.loss_scale > 1:
                self.stations.loss_scale = 1.0
                probe.tape.clear()
                self._run(probe, "record")
                wrong = probe.not_finite()
            if wrong:
                raise VerificationError(
                    f"the stock model's own {wrong} is not finite, on {probe.name}: there is "
                    "nothing to compare with. Check the weights, or use bfloat16."
                )

    def _measure_noise(self) -> None:
        for draw in range(DRAWS):
            for probe in self.probes:
                for mode in ("free", "held"):
                    for key, error in self._run(probe, mode, nudge=draw + 1).items():
                        known = self.noise.get(_kind(key), error)
                        self.noise[_kind(key)] = torch.maximum(known, error)

    def _try(self, patch: Patch, bad: set[str]) -> Row:
        places = self.patches.of(patch)
        about = patch.name, patch.modality, len(places)
        needed = {patch.needs(place.module) for place in places} & bad
        if needed:
            return Row(*about, reason=f"not tried: it needs {needed.pop()!r}", tried=False)
        if patch.name in CORRECTIONS:
            return Row(*about, note="not compared: it mends stock", tried=False)
        concerned = {_modality(place.path) for place in places}
        probes = [probe for probe in self.probes if probe.modality in concerned]
        if not probes:
            return Row(*about, note="not tried: see below", tried=False)

        def find() -> dict[str, list[Measure]]:
            self.patches.put_in(patch)
            if patch is graphs_patch:
                return self._found(probes)
            found: dict[str, list[Measure]] = {sort: [] for sort in _SORTS}
            with self.stations.spare(self.spared):
                for probe in probes:
                    self._compare(probe, "held", found)
            if patch is checkpointing_patch:
                self._find_in_modes(probes, found)
            return found

        row = self._attempt(*about, find)
        if not row.ok:
            self.patches.put_out(patch)
        return row

    def _attempt(
        self, name: str, modality: str, places: int, find: Callable[[], dict[str, list[Measure]]]
    ) -> Row:
        try:
            found = find()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            return Row(name, modality, places, reason=reason)
        worst = [max(found[sort], key=_ratio, default=_NOTHING) for sort in _SORTS]
        return Row(name, modality, places, loss=worst[0], output=worst[1], gradient=worst[2])

    def _found(self, probes: list[_Probe]) -> dict[str, list[Measure]]:
        """How the model as it is now compares, left to itself too, and with graphs if it has
        any.
        """
        found: dict[str, list[Measure]] = {sort: [] for sort in _SORTS}
        layers: Any = text_model(self.patches.base).layers
        steady = any(getattr(layer, "graphs", None) is not None for layer in layers)
        for probe in probes:
            # before graphs are captured, which would run past the stations
            self._compare(probe, "held", found)
            # batches that have kept their shape are captured: then the last of several runs counts
            for _ in range(STEADY if steady else 0):
                self._run(probe, "free")
            self._compare(probe, "free", found)
        return found

    def _find_in_modes(self, probes: list[_Probe], found: dict[str, list[Measure]]) -> None:
        """Every way in which a layer may pay for its backward, whatever this batch's would be."""
        text: Any = text_model(self.patches.base)
        modes = list(Mode)
        for shift in (0, len(modes) // 2):
            with _kept(text), _in_modes(text, [*modes[shift:], *modes[:shift]]):
                for probe in probes:
                    self._compare(probe, "held", found)

    def _compare(self, probe: _Probe, mode: str, found: dict[str, list[Measure]]) -> None:
        for key, error in self._run(probe, mode).items():
            found[_sort(key)].append(self._judge(f"{key} ({probe.name})", key, error))

    def _judge(self, where: str, key: str, error: Tensor) -> Measure:
        if self.rtol is not None:
            budget = torch.full_like(error, self.rtol)
        else:
            floor = self.stations.unit * _FLOORS + 32 * torch.finfo(torch.float32).eps
            noise = self.noise.get(_kind(key), torch.zeros_like(error))
            # where it is one number, the nudged runs' may happen to lie close to stock's
            single = 2 if key in ("loss", _EVERY_GRADIENT) else 1
            budget = torch.maximum(single * MULTIPLE * noise, floor)
        worst = int((error / budget).nan_to_num(nan=float("inf")).argmax())
        return Measure(error[worst].item(), budget[worst].item(), f"{where}, {_STATISTICS[worst]}")

    def _run(self, probe: _Probe, mode: str, *, nudge: int = 0) -> dict[str, Tensor]:
        """One pass; the errors of what it met, by name."""
        torch.manual_seed(0)  # the same dropout in every run
        torch.clear_autocast_cache()
        stations = self.stations
        stations.begin(probe, mode, nudge)
        try:
            with torch.set_grad_enabled(bool(self.trained)):
                loss = probe.run(stations)
                stations.loss(loss)
            if loss.requires_grad:
                (loss * stations.loss_scale).backward()
                stations.gradients(self.trained)
            return stations.seen()
        finally:
            stations.end()
            for _, parameter in self.trained:
                parameter.grad = None


_SORTS = ("loss", "output", "gradient")
_STATISTICS = ("2-norm", "largest element", "along stock's value")
# in units in the last place: a rounding is at most half of one, and averages out along a value
_FLOORS = torch.tensor([1.0, 2.0, 0.25], dtype=torch.float64)


def _ratio(measure: Measure) -> float:
    ratio = measure.error / measure.budget if measure.budget else float("inf")
    return ratio if ratio == ratio else float("inf")


def _kind(key: str) -> str:
    """Quantities that share a budget: the same one of every layer."""
    return re.sub(r"\.\d+\b", ".#", key)


def _sort(key: str) -> str:
    if key == "loss":
        return "loss"
    return "gradient" if key.startswith("gradient") else "output"


def _errors(ours: Tensor, stock: Tensor, *, activations: bool) -> Tensor:
    """Relative difference, float64 [3]: 2-norm, largest element, part along ``stock``.

    What is not finite is infinite. The last is asked of activations [..., D] and their gradients.
    Random errors have such a part too: if each token's are its own, 1/sqrt(n) of their size, n
    being the tokens that matter (a gradient may be ruled by few: n is the participation ratio of
    their squares). Four times that is taken off. A parameter's gradient is a sum over tokens, so
    nothing is known of its share.
    """
    s = stock.double()
    d = ours.double() - s
    squares = s.square().sum(-1).flatten() if activations else s.square().sum().view(1)
    size = squares.sum().sqrt()
    if size == 0:
        same = not bool(d.any())
        return torch.zeros(3, dtype=torch.float64) if same else _INFINITE
    norm = torch.linalg.vector_norm(d) / size
    along = norm * 0
    if activations:
        chance = squares.square().sum().sqrt() / squares.sum()
        along = ((d * s).sum().abs() / size**2 - 4 * norm * chance).clamp_min(0)
    errors = torch.stack((norm, d.abs().max() / s.abs().max(), along))
    return errors.cpu().nan_to_num(nan=float("inf"))


# --- the runs: what goes in ---------------------------------------------------------------------


@dataclasses.dataclass
class _Probe:
    """A small batch, how to run it, and what the stock run gave."""

    name: str
    modality: str
    run: Callable[[_Stations], Tensor]
    mask: Tensor | None = None
    tape: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def not_finite(self) -> str:
        """The name of the first thing on the tape that is not finite, "" where all is."""
        return next((key for key, x in self.tape.items() if not torch.isfinite(x).all()), "")


def _probes(model: Any, base: nn.Module, device: torch.device) -> tuple[list[_Probe], list[str]]:
    probes = [_text_probe(model, base, device), _labelled_probe(model, base, device)]
    notes = []
    for name, tower, make in (
        ("vision", "vision_tower", _image_probe),
        ("audio", "audio_tower", _audio_probe),
    ):
        module = getattr(base.model, tower, None)
        if module is None:
            continue
        where = next(module.parameters()).device
        if where != device or getattr(module, "_gemma_accel_parked", None) is not None:
            notes.append(
                f"{name} not looked at: its tower waits on the {where}, unused by this run"
            )
            continue
        probes.append(make(base, device))
    return probes, notes


def _modality(path: str) -> str:
    """Which probes reach a module."""
    for name in ("vision", "audio"):
        if f"{name}_tower" in path or f"embed_{name}" in path:
            return name
    return "text"


def _tokens(base: nn.Module, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids of plain text tokens [2, length] and their mask: the second row is padded."""
    config: Any = base.config
    text = config.get_text_config()
    tokens = min(
        text.vocab_size, getattr(text, "vocab_size_per_layer_input", None) or text.vocab_size
    )
    special = {
        value
        for owner in (config, text)
        for name, value in vars(owner).items()
        if re.fullmatch(r".*_token_(id|index)", name) and isinstance(value, int)
    }
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(tokens, (2, length), generator=generator)
    while (taken := torch.isin(ids, torch.tensor(sorted(special) or [-1]))).any():
        ids[taken] = torch.randint(tokens, (int(taken.sum()),), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length * 3 // 4 :] = 0
    ids[mask == 0] = text.pad_token_id or 0
    return ids.to(device), mask.to(device)


def _text_probe(model: Any, base: nn.Module, device: torch.device) -> _Probe:
    """Beyond the sliding window. Every eighth position's logits: all would be gigabytes."""
    config: Any = base.config
    window = getattr(config.get_text_config(), "sliding_window", None) or 0
    ids, mask = _tokens(base, min(window + 32, 640), device)
    kept = torch.arange(ids.shape[1] % 8, ids.shape[1] - 1, 8, device=device)
    targets = ids[:, kept + 1].masked_fill(mask[:, kept + 1] == 0, -100)

    def run(stations: _Stations) -> Tensor:
        out = model(input_ids=ids, attention_mask=mask, logits_to_keep=kept, use_cache=False)
        logits = out.logits[targets != -100]
        stations.observe("logits", logits)
        return F.cross_entropy(logits.float(), targets[targets != -100])

    return _Probe("text", "text", run, mask.bool())


def _labelled_probe(model: Any, base: nn.Module, device: torch.device) -> _Probe:
    """The model's own loss, of few tokens."""
    ids, mask = _tokens(base, 24, device)
    labels = ids.masked_fill(mask == 0, -100)

    def run(stations: _Stations) -> Tensor:
        out = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
        loss: Tensor = out.loss
        return loss

    return _Probe("labels", "text", run, mask.bool())


def _image_probe(base: nn.Module, device: torch.device) -> _Probe:
    """Two pictures of noise, the second padded, through the tower and its embedder."""
    inner: Any = base.model
    config = inner.config.vision_config
    wide, high = 4 * config.pooling_kernel_size, 3 * config.pooling_kernel_size
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(2, wide * high, 3 * config.patch_size**2, generator=generator).to(device)
    y, x = torch.meshgrid(torch.arange(high), torch.arange(wide), indexing="ij")
    positions = torch.stack((x, y), -1).reshape(1, -1, 2).repeat(2, 1, 1)
    positions[1, wide * (high - config.pooling_kernel_size) :] = -1
    positions = positions.to(device)

    def run(stations: _Stations) -> Tensor:
        out = inner.get_image_features(pixels, positions).pooler_output
        return _tower_loss(stations, out if isinstance(out, Tensor) else torch.cat(tuple(out)))

    return _Probe("vision", "vision", run, (positions >= 0).all(-1))


def _audio_probe(base: nn.Module, device: torch.device) -> _Probe:
    """Two sounds of noise, the second padded, through the tower and its embedder."""
    inner: Any = base.model
    bins = inner.audio_tower.config.subsampling_conv_channels[
        0
    ]  # as wide as the first convolution has channels
    generator = torch.Generator().manual_seed(2)
    frames = torch.randn(2, 128, bins, generator=generator)
    frames = frames.to(device, next(inner.audio_tower.parameters()).dtype)
    mask = torch.ones(2, 128, dtype=torch.bool, device=device)
    mask[1, 100:] = False

    def run(stations: _Stations) -> Tensor:
        out = inner.get_audio_features(frames, mask)
        return _tower_loss(stations, out.pooler_output[out.attention_mask])

    return _Probe("audio", "audio", run, mask[:, ::2][:, ::2])  # two convolutions of stride 2


def _tower_loss(stations: _Stations, features: Tensor) -> Tensor:
    """A number that every feature moves: the mean of their products with fixed random ones."""
    stations.observe("features", features)
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(features.shape, generator=generator).to(features.device)
    return (features.float() * weights).mean() + features.float().square().mean()


# --- the runs: what is looked at ----------------------------------------------------------------

_SAMPLE = 1 << 21  # elements of a gradient that are kept and compared: spread over all of it
_ROWS = 64  # tokens of a block's output
_INPUT = " input"
_EVERY_GRADIENT = "gradient of everything"
_INFINITE = torch.full((3,), float("inf"), dtype=torch.float64)


class _Station(torch.autograd.Function):
    """A point of the model's graph that `_Stations.meet` sees on the way there and back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stations: _Stations, key: str, hold: bool) -> Tensor:
        # weakly: a graph that a failed run leaves behind would hold the model, out of the
        # collector's sight
        ctx.about = weakref.ref(stations), key, hold
        return stations.meet(key, x, hold)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        reference, key, hold = ctx.about
        stations = reference()
        if stations is not None:
            dy = stations.meet(f"gradient of {key}", dy, hold)
        return dy, None, None, None


class _Stations:
    """Sit at every layer's input and behind the text layers' attention and MLP.

    Modes of a run: ``record`` puts what comes by on the probe's tape; ``held`` compares with the
    tape and passes on what the tape has; ``free`` leaves the model alone (nudged or not) and
    compares what comes out.
    """

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.unit = torch.finfo(torch.float32).eps
        self.loss_scale = 1.0
        self._computes_in(text_model(base).embed_tokens.weight.dtype)
        for module in base.modules():
            self._computes_in(getattr(module, "compute_dtype", None))  # an NF4 layer's
        self._handles: list[Any] = []
        self._probe: _Probe | None = None
        self._mode, self._nudge = "free", 0
        self._seen: dict[str, Tensor] = {}
        self._spared: re.Pattern[str] | None = None

    @contextlib.contextmanager
    def spare(self, layers: list[nn.Module]) -> Iterator[None]:
        """These text layers hand on what they get, and are not looked at. Nor is what sums over
        layers: the gradients of parameters in front of them, and those of keys and values that
        several share.
        """
        if not layers:
            yield
            return
        paths = {id(module): path for path, module in self.base.named_modules()}
        every = list(text_model(self.base).layers)
        parts = [rf"gradient of (?!.*_tower).*\.(?:{'|'.join(_IN_FRONT)})\."]
        for layer in layers:
            path, index = re.escape(paths[id(layer)]), every.index(layer)
            # what a layer hands on is seen where the next one begins
            after = re.escape(paths[id(every[index + 1])]) if index + 1 < len(every) else "norm"
            parts += [rf"{path}\.", rf"gradient of {path}{_INPUT}$", rf"^{after}{_INPUT}$"]
        for layer in every:
            if getattr(layer.self_attn, "store_full_length_kv", False):
                path = re.escape(paths[id(layer)])
                behind = rf"{_INPUT}$|\.self_attn\.|\.input_layernorm\."
                parts.append(rf"gradient of .*{path}(?:{behind})")
        self._spared = re.compile("|".join(parts))
        try:
            for layer in layers:
                vars(layer)["forward"] = _hand_on
            yield
        finally:
            self._spared = None
            for layer in layers:
                vars(layer).pop("forward", None)

    def _is_spared(self, key: str) -> bool:
        return self._spared is not None and self._spared.search(key) is not None

    def _computes_in(self, dtype: Any) -> None:
        if dtype is not None:
            self.unit = max(self.unit, torch.finfo(dtype).eps)
        if dtype is torch.float16:
            self.loss_scale = 128.0  # as a scaler would: float16 has no small gradients

    def begin(self, probe: _Probe, mode: str, nudge: int) -> None:
        self._probe, self._mode, self._nudge, self._seen = probe, mode, nudge, {}
        if mode != "free" or nudge:
            self._attach()

    def seen(self) -> dict[str, Tensor]:
        """This run's errors. A layer, or its gradient, that never came by is infinitely off."""
        assert self._probe is not None
        if self._mode == "held":
            for key in self._probe.tape:
                missed = key.endswith(_INPUT) and key not in self._seen
                if missed and not self._is_spared(key):
                    self._seen[key] = _INFINITE
        return self._seen

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._probe = None

    def _attach(self) -> None:
        layers = (Gemma4TextDecoderLayer, Gemma4VisionEncoderLayer, Gemma4AudioLayer)
        for path, module in self.base.named_modules():
            if isinstance(module, layers):
                self._before(path, module)
            if isinstance(module, Gemma4TextDecoderLayer):
                for name in ("self_attn", "mlp"):
                    self._behind(f"{path}.{name}", getattr(module, name))
        self._before("norm", text_model(self.base).norm)

    def _before(self, path: str, module: nn.Module) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (_Station.apply(args[0], self, f"{path}{_INPUT}", True), *args[1:]), kwargs
            held = _Station.apply(kwargs["hidden_states"], self, f"{path}{_INPUT}", True)
            return args, {**kwargs, "hidden_states": held}

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _behind(self, path: str, module: nn.Module) -> None:
        def hook(_: nn.Module, args: Any, out: Any) -> Any:
            first = out[0] if isinstance(out, tuple) else out
            first = _Station.apply(first, self, path, False)
            return (first, *out[1:]) if isinstance(out, tuple) else first

        self._handles.append(module.register_forward_hook(hook))

    def meet(self, key: str, x: Tensor, hold: bool) -> Tensor:
        """Record or compare ``x``; returns what goes on from here."""
        if self._probe is None:
            return x.clone()
        if self._mode == "record":
            if torch.is_autocast_enabled(x.device.type):  # a trainer's, perhaps, inside the model
                self._computes_in(torch.get_autocast_dtype(x.device.type))
            self._record(key, x if hold else self._rows_of(x))
        elif self._mode == "held" and key in self._probe.tape:
            stock = self._probe.tape[key].to(x.device)
            # a checkpointed layer comes by twice
            if key not in self._seen and not self._is_spared(key):
                ours, theirs = (x, stock) if hold else (self._rows_of(x), stock)
                if hold:
                    ours, theirs = self._tokens_of(ours), self._tokens_of(theirs)
                self._compare(key, ours, theirs, activations=True)
            if hold:
                x = stock.to(x.dtype)
        return self._nudged(key, x) if hold and self._nudge else x.clone()

    def observe(self, key: str, x: Tensor) -> None:
        """Record or compare a result [rows, columns]."""
        assert self._probe is not None
        x = x.detach()[:: max(len(x) // 16, 1)]
        if self._mode == "record":
            self._record(key, x)
        elif self._mode == "held":
            self._compare(key, x, self._probe.tape[key].to(x.device))

    def loss(self, loss: Tensor) -> None:
        assert self._probe is not None
        if self._mode == "record":
            self._record("loss", loss.double())
        else:
            self._compare("loss", loss.double(), self._probe.tape["loss"].to(loss.device))

    def gradients(self, trained: list[tuple[str, nn.Parameter]]) -> None:
        """Record or compare every parameter's; in a free run all of them as one."""
        assert self._probe is not None
        tape = self._probe.tape
        differences, sizes = [0.0], [0.0]
        for name, parameter in trained:
            key = f"gradient of {name}"
            gradient, stock = parameter.grad, tape.get(key)
            if self._is_spared(key):
                continue
            if self._mode == "record":
                if gradient is not None:
                    self._record(key, _sampled(gradient))
            elif gradient is None or stock is None:
                if gradient is not None or stock is not None:
                    self._seen[key] = _INFINITE
            elif self._mode == "held":
                self._compare(key, _sampled(gradient), stock.to(gradient.device))
            else:
                stock, ours = stock.to(gradient.device).double(), _sampled(gradient).double()
                differences.append((ours - stock).square().sum().item())
                sizes.append(stock.square().sum().item())
        if self._mode == "free" and len(sizes) > 1:
            total = (sum(differences) / (sum(sizes) or 1.0)) ** 0.5
            self._seen[_EVERY_GRADIENT] = torch.tensor([total, 0, 0], dtype=torch.float64)

    def _record(self, key: str, x: Tensor) -> None:
        assert self._probe is not None
        if key not in self._probe.tape:
            self._probe.tape[key] = x.detach().to("cpu", copy=True)

    def _compare(self, key: str, ours: Tensor, stock: Tensor, *, activations: bool = False) -> None:
        if ours.shape != stock.shape:
            self._seen[key] = _INFINITE
        else:
            self._seen[key] = _errors(ours.detach(), stock, activations=activations)

    def _tokens_of(self, x: Tensor) -> Tensor:
        """Without padding, which may see what it likes."""
        mask = self._probe.mask if self._probe is not None else None
        return x[mask] if mask is not None and x.shape[:2] == mask.shape else x

    def _rows_of(self, x: Tensor) -> Tensor:
        rows = self._tokens_of(x).flatten(0, -2) if x.dim() > 1 else x
        return rows[:: max(len(rows) // _ROWS, 1)]

    def _nudged(self, key: str, x: Tensor) -> Tensor:
        # seeded by place: a recomputed layer is nudged as it was before
        generator = torch.Generator(x.device).manual_seed(zlib.crc32(key.encode()) + self._nudge)
        half = (torch.rand(x.shape, generator=generator, device=x.device) - 0.5) * self.unit
        return (x.float() * (1 + half)).to(x.dtype)


_IN_FRONT = (
    "embed_tokens",
    "embed_tokens_per_layer",
    "per_layer_model_projection",
    "per_layer_projection_norm",
)


def _hand_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _spared(text: Any) -> list[nn.Module]:
    """The decoder layers that are neither the first nor the last of their kind."""
    kinds: dict[Any, list[int]] = {}
    for index, (layer, shape) in enumerate(
        zip(text.layers, layer_shapes(text.config), strict=True)
    ):
        gives = getattr(layer.self_attn, "store_full_length_kv", False)
        kinds.setdefault((shape, gives), []).append(index)
    return [text.layers[index] for indices in kinds.values() for index in indices[1:-1]]


def _sampled(gradient: Tensor) -> Tensor:
    flat = gradient.detach().flatten()
    return flat[:: (len(flat) // _SAMPLE) | 1] if len(flat) > _SAMPLE else flat


# --- the model: stock, patch by patch, and as it was --------------------------------------------


@dataclasses.dataclass
class _Place:
    """One patch in one module; ``undo`` while it is in."""

    patch: Patch
    path: str
    module: nn.Module
    undo: Undo | None = None


class _Patches:
    """Takes a model's patches out and puts them in; on leaving, all is as it was on entering.

    An applied model keeps its report, in which the undos are exchanged for the last installation's.
    """

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.report = report_of(base)
        self.places: list[_Place] = []
        self._policy = getattr(text_model(base), "memory", None)
        self._bound: Any = None
        if self.report is None:
            _refuse_foreign(base)
            found = _candidates(base, registry().patches(), Report())
            self.places = [_Place(*candidate) for candidate in found]
        else:
            self._read(self.report)

    def _read(self, report: Report) -> None:
        """An applied model's places: the report's records and, in the same order, its undos."""
        if obstacles := [reason for check in report._checks if (reason := check())]:
            raise VerificationError(
                f"the stock model cannot be had for comparison: {'; '.join(obstacles[:3])}. Undo "
                "that first, or verify before."
            )
        offered = {patch.name: patch for patch in registry().patches()}
        undos = report._undos[1 : 1 + len(report.applied)]  # the first lets go of the report itself
        if gone := {record.patch for record in report.applied} - offered.keys():
            raise VerificationError(
                f"nobody offers {', '.join(map(repr, sorted(gone)))} any more: a plugin was "
                "unregistered after apply. Register it again, or restore() and apply again."
            )
        for record, undo in zip(report.applied, undos, strict=True):
            module = _module_at(self.base, record.path)
            self.places.append(_Place(offered[record.patch], record.path, module, undo))

    def __enter__(self) -> _Patches:
        # copies that PEFT made of patched modules (`modules_to_save`): theirs whose class they have
        known = {id(place.module) for place in self.places}
        self._copies: list[tuple[nn.Module, type[Fused]]] = [
            (module, type(module))
            for module in self.base.modules()
            if isinstance(module, Fused) and not isinstance(module, HostPerLayerEmbedding)
            if id(module) not in known
        ]
        self._tables = [m for m in self.base.modules() if type(m) is HostPerLayerEmbedding]
        self._frozen = [t.weight for t in self._tables if t.weight.requires_grad]
        # such a table cannot be trained from where it is: a Trainer brings it back first
        for weight in self._frozen:
            weight.requires_grad_(False)
        return self

    def __exit__(self, *_: object) -> None:
        self._all_out()
        if self._bound is not None:
            vars(self.base)["forward"] = self._bound
        if self.report is not None:
            for place in self.places:
                _in(place)
            undos = [place.undo for place in self.places if place.undo is not None]
            self.report._undos[1 : 1 + len(self.places)] = undos
            self.report._checks[:] = [
                _at(place.path, obstacle)
                for place in self.places
                if (obstacle := getattr(place.undo, "obstacle", None))
            ]
        for layer in text_model(self.base).layers:
            if (graphs := getattr(layer, "graphs", None)) is not None:
                graphs.drop()  # captured for this comparison alone
        for module, fused in self._copies:
            _become(module, fused)
        for weight in self._frozen:
            weight.requires_grad_(True)

    def in_order(self) -> list[Patch]:
        return list({place.patch.name: place.patch for place in self.places}.values())

    def of(self, patch: Patch) -> list[_Place]:
        return [place for place in self.places if place.patch is patch]

    def take_out(self) -> None:
        """To the stock model: without what a trainer bound to it, too."""
        self._all_out()
        self._bound = vars(self.base).pop("forward", None) or self._bound
        for place in self.places:
            if place.patch.name in CORRECTIONS:
                _in(place)
        for module, fused in self._copies:
            _become(module, fused.stock)
        for table in self._tables:
            vars(table)["forward"] = _plain_lookup(table)

    def put_in(self, patch: Patch) -> None:
        for place in self.of(patch):
            _in(place)
        for module, fused in self._copies_of(patch):
            _become(module, fused)
        self._set_policy()

    def put_out(self, patch: Patch) -> None:
        for place in reversed(self.of(patch)):
            _out(place)
        for module, fused in self._copies_of(patch):
            _become(module, fused.stock)

    def _copies_of(self, patch: Patch) -> list[tuple[nn.Module, type[Fused]]]:
        return [copy for copy in self._copies if getattr(patch, "fused", None) is copy[1]]

    def _all_out(self) -> None:
        """Newest first."""
        for place in reversed(self.places):
            _out(place)

    def put_back(self) -> None:
        """All of them."""
        for place in self.places:
            _in(place)
        for module, fused in self._copies:
            _become(module, fused)
        for table in self._tables:
            vars(table).pop("forward", None)
        self._set_policy()

    def _set_policy(self) -> None:
        """The memory policy just installed decides as the one before it, or as `apply`'s would."""
        now: Any = getattr(text_model(self.base), "memory", None)
        if now is None or now is self._policy:
            return
        if self._policy is not None:
            for name in ("budget", "fixed", "trained"):
                setattr(now, name, getattr(self._policy, name))
            return
        with contextlib.suppress(BudgetError):
            gib = memory_budget(self.base, None)
            now.budget = None if gib is None else int(gib * 2**30)


def _become(module: nn.Module, kind: type) -> None:
    module.__class__ = kind


def _in(place: _Place) -> None:
    if place.undo is None:
        place.undo = place.patch.install(place.module)


def _out(place: _Place) -> None:
    undo, place.undo = place.undo, None
    if undo is not None:
        undo()


def _module_at(base: nn.Module, path: str) -> nn.Module:
    """The module that was at ``path``, whatever wrappers PEFT has put around it since."""
    module: Any = base
    for name in path.split(".") if path else ():
        for inside in ("", "original_module", "base_layer"):
            owner = getattr(module, inside, None) if inside else module
            if owner is not None and name in owner._modules:
                module = owner._modules[name]
                break
        else:
            raise VerificationError(
                f"there is no {path!r} any more, where a patch was installed. restore(), and apply "
                "again."
            )
    for inside in ("original_module", "base_layer"):
        module = module._modules.get(inside, module)
    return module


def _plain_lookup(table: Any) -> Callable[[Tensor], Tensor]:
    """Stock's arithmetic with the rows read by the CPU, for a table that is not on the device."""

    def forward(ids: Tensor) -> Tensor:
        rows = F.embedding(ids.cpu(), table.weight.detach()).to(ids.device, table._output_dtype)
        return rows * table.embed_scale.to(ids.device, table._output_dtype)

    return forward


@contextlib.contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Gives every module its attributes back: modes, what patches set, what a run leaves behind."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            now = vars(module)
            for name in now.keys() - attributes.keys():
                del now[name]
            now.update(attributes)


def _checkpoint(text: Any, *, anew: bool = False) -> None:
    """Checkpointing as Transformers sets it up by default, where there is none. Inside `_kept`."""
    for layer in text.layers:
        if anew or not layer.gradient_checkpointing:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)


@contextlib.contextmanager
def _in_modes(text: Any, modes: list[Mode]) -> Iterator[None]:
    """The text model's layers are checkpointed, in these modes by turns. Inside `_kept`."""
    policy = text.memory
    budget = policy.budget
    policy.budget = budget or 1 << 60
    by_turns = [modes[i % len(modes)] for i in range(len(text.layers))]
    policy.forced = Arrangement(by_turns, graphed=False, head_tile=HEAD_TILE)
    _checkpoint(text, anew=True)
    try:
        yield
    finally:
        policy.budget = budget
        policy.forced = None


@contextlib.contextmanager
def _gradients_aside(model: nn.Module) -> Iterator[None]:
    """No parameter has a gradient inside; each has its own again after."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


@contextlib.contextmanager
def _adapters_awake(model: nn.Module) -> Iterator[None]:
    """A fresh adapter's B is all zeros, which hides what A's side gets wrong: it is not, inside."""
    asleep = [
        (parameter, parameter.data)
        for name, parameter in model.named_parameters()
        if "lora_B" in name or "lora_embedding_B" in name
        if parameter.requires_grad and not parameter.detach().any()
    ]
    generator = torch.Generator().manual_seed(4)
    for parameter, zeros in asleep:
        parameter.data = (torch.randn(zeros.shape, generator=generator) * 0.02).to(zeros)
    try:
        yield
    finally:
        for parameter, zeros in asleep:
            parameter.data = zeros
