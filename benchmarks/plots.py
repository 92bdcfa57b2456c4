"""Pictures of what was measured, from the committed results alone.

    python -m benchmarks.plots

Reads ``benchmarks/results/*.json`` and writes SVG to ``benchmarks/plots/``: peak memory and speed
by stack, memory against sequence length, loss curves, the learning curve. What no file has is left
out, and named on stdout. Backgrounds are transparent and text a grey that is as legible on white as
on GitHub's dark, so one file serves both. The same results give the same bytes.

For each work one file is drawn, the one that has most stacks: stacks of one run can be compared. A
stack, or a budget, that only another run of the same card has is drawn too, with an asterisk.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.losses import compare
from benchmarks.works import MEDIA_WORKS, WORKS, plan_of

HERE = Path(__file__).parent
CARD_GIB, USABLE_GIB = 8.0, 7.0
CUT_GIB = 1.5 * CARD_GIB  # where a bar that goes on is cut

TEXT = "#727a83"  # 4.35 to 1 on white and on GitHub's dark
MEASURED = "#8b949e"
STACKS = {  # name and colour, of Okabe and Ito's, which the colour-blind tell apart
    "trl": ("TRL", "#8b949e"),
    "liger": ("TRL + Liger", "#e69f00"),
    "unsloth": ("Unsloth", "#cc79a7"),
    "gemma_accel": ("gemma_accel", "#2b8cd6"),
}
PARTS = {  # a picture's part -> its colour, and the planner's components in it
    "weights": ("#2b8cd6", ("text linears", "experts", "embedding", "norms")),
    "per-layer table": ("#d55e00", ("per-layer table",)),
    "towers": ("#cc79a7", ("towers",)),
    "adapters, gradients, optimizer": ("#009e73", ("adapters", "gradients", "optimizer state")),
    "activations and workspace": (
        "#e69f00",
        ("kept activations", "workspace", "loss", "towers' backward", "allocator slack"),
    ),
}
MODELS = {"e2b": "E2B", "e4b": "E4B"}
MEDIA = {"images": "two images", "photos": "two padded photos", "sound": "30 s of sound"}


# -- what was measured ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Results:
    """One file: where it was measured, and its rows."""

    name: str
    content: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content["rows"]

    @property
    def card(self) -> str:
        return self.content.get("card", "none")

    @property
    def apart(self) -> bool:
        """Whether its stacks did not take their steps in turn."""
        return "--apart" in self.content.get("command", "")

    def of(self, work: str) -> list[dict[str, Any]]:
        """A work's rows of stacks that are drawn; weights loaded in float32 are not."""
        rows = [row for row in self.rows if row.get("work") == work and not row.get("float32")]
        return [row for row in rows if row.get("stack") in STACKS]


def read(directory: Path) -> list[Results]:
    """Every file that has rows of works; the rest of the folder is other benchmarks' business."""
    found = []
    for path in sorted(directory.glob("*.json")):
        content = json.loads(path.read_text())
        rows = content.get("rows") if isinstance(content, dict) else None
        if isinstance(rows, list) and any("work" in row for row in rows):
            found.append(Results(path.name, content))
    return found


@dataclass
class Entry:
    """A stack's figures in a work: of all its seeds the highest memory and the median step."""

    stack: str
    label: str
    rows: list[dict[str, Any]]
    source: Results
    borrowed: bool = False  # from another run than the work's other entries

    @property
    def name(self) -> str:
        name, row = STACKS[self.stack][0], self.rows[0]
        if limit := row.get("vram_gib"):
            name += f", vram_gib={limit:g}"
        elif limit := row.get("cap_gib"):
            name += f", {limit:g} GiB"
        elif self.stack == "gemma_accel":
            name += ", no limit"
        return name + "*" * self.borrowed

    @property
    def limited(self) -> bool:
        return bool(self.rows[0].get("vram_gib") or self.rows[0].get("cap_gib"))

    @property
    def error(self) -> str | None:
        return next((row["error"] for row in self.rows if "error" in row), None)

    @property
    def peak_gib(self) -> float | None:
        peaks = [row["peak_reserved_gib"] for row in self.rows if "peak_reserved_gib" in row]
        return max(peaks, default=None)

    @property
    def tokens_per_second(self) -> float | None:
        steps = [row["step_s"] for row in self.rows if "step_s" in row]
        return _tokens(self.rows[0]) / statistics.median(steps) if steps else None


def _tokens(row: dict[str, Any]) -> int:
    if "sequence_length" in row:
        return row["batch_size"] * row["sequence_length"]
    return row["text_tokens"] + row["soft_tokens"]


@dataclass
class Work:
    """A work's entries, in the order of `STACKS`."""

    name: str
    entries: list[Entry] = field(default_factory=list)
    elsewhere: str = ""
    """the card, where it is not that of the other works"""

    def showing(self, entries: list[Entry]) -> Work:
        """With these entries in place of its own."""
        return dataclasses.replace(self, entries=entries)

    @property
    def title(self) -> str:
        return self._shape() + (f", on {self.elsewhere}" if self.elsewhere else "")

    def _shape(self) -> str:
        if self.name in MEDIA:
            text = MEDIA_WORKS[self.name].text
            return f"W6  E2B, NF4, {MEDIA[self.name]} and {text} tokens, adapters in the tower too"
        work = WORKS[self.name]
        weights = "NF4" if work.quantised else "bf16"
        shape = f"{work.batch_size} × {work.sequence_length:,} tokens"
        return f"{self.name}  {MODELS[work.model]}, {weights}, {shape}"


ORDER = (*WORKS, *MEDIA)


def works(results: Sequence[Results]) -> list[Work]:
    """Each work that somebody measured: on the card that has most rows, or else on another."""
    cards = Counter(r.card for r in results for name in ORDER for _ in r.of(name))
    if not cards:
        return []
    home = cards.most_common(1)[0][0]
    found = []
    for name in ORDER:
        measured = [r for r in results if r.of(name)]
        card = max((r.card for r in measured), key=cards.__getitem__, default="")
        files = [r for r in measured if r.card == card]
        files.sort(key=lambda r: (len(_labels(r.of(name))), r.content.get("date", "")))
        work = Work(name, elsewhere="" if card == home else card)
        for file in reversed(files):
            have, stacks = {e.label for e in work.entries}, {e.stack for e in work.entries}
            for label in sorted(_labels(file.of(name)) - have):
                rows = [row for row in file.of(name) if row["label"] == label]
                stack = rows[0]["stack"]
                # a budget of its own, beside stock
                budget = rows[0].get("vram_gib") and "trl" in _labels(file.of(name))
                if stack not in stacks or budget or file is files[-1]:
                    work.entries.append(Entry(stack, label, rows, file, file is not files[-1]))
        work.entries.sort(key=lambda e: (list(STACKS).index(e.stack), -_limit(e), e.label))
        if work.entries:
            found.append(work)
    return found


def _labels(rows: Iterable[dict[str, Any]]) -> set[str]:
    return {row["label"] for row in rows}


def _limit(entry: Entry) -> float:
    row = entry.rows[0]
    return row.get("vram_gib") or row.get("cap_gib") or 1e9


# -- what the planner says ------------------------------------------------------------------------


def parts(work: str, entry: Entry) -> dict[str, float] | None:
    """GiB by part, as predicted; None for what the planner knows nothing about."""
    if entry.stack not in ("trl", "gemma_accel") or entry.peak_gib is None:
        return None
    made = plan_of(work, _limit(entry) if entry.limited else None)
    if entry.stack == "gemma_accel":
        sizes = made.components
        return {
            part: sum(sizes.get(name, 0.0) for name in names) for part, (_, names) in PARTS.items()
        }
    return _stock_parts(made)


def _stock_parts(made: Any) -> dict[str, float]:
    """Stock keeps the table and the towers on the GPU; what else its peak has, comes and goes."""
    sizes: Counter[str] = Counter()
    for name, size in made.components.items():
        sizes[name.removesuffix(" (host)")] += size
    found = {part: sum(sizes[n] for n in names) for part, (_, names) in PARTS.items()}
    resident = [part for part in PARTS if part != "activations and workspace"]
    peak = made.choices["alternatives"]["stock TRL, training"]
    found["activations and workspace"] = peak - sum(found[part] for part in resident)
    return found


# -- drawing --------------------------------------------------------------------------------------


def _style() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "svg.hashsalt": "gemma_accel",  # the same ids each time
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "savefig.facecolor": "none",
            "font.family": "DejaVu Sans",  # comes with matplotlib
            "font.size": 8.5,
            "text.color": TEXT,
            "axes.labelcolor": TEXT,
            "axes.titlesize": 9,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.edgecolor": TEXT,
            "axes.linewidth": 0.6,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "xtick.color": TEXT,
            "ytick.color": TEXT,
            "xtick.major.width": 0.6,
            "ytick.major.width": 0.6,
            "legend.frameon": False,
            "legend.fontsize": 8,
            "grid.color": TEXT,
            "grid.alpha": 0.25,
            "grid.linewidth": 0.5,
        }
    )
    return pyplot


WIDE = 150  # characters of a caption's line


def _caption(text: str, sources: Iterable[Results]) -> list[str]:
    """What is shown, and below it where it was measured, in lines."""
    where: dict[str, list[str]] = {}
    for source in dict.fromkeys(sources):
        where.setdefault(_where(source), []).append(source.name)
    lines = textwrap.wrap(text, WIDE)
    for place, names in where.items():
        lines += textwrap.wrap(f"{', '.join(names)}: {place}", WIDE)
    return lines


def _where(source: Results) -> str:
    """Card, versions (of the stacks that the file has) and commit."""
    stacks = {row.get("stack") for row in source.rows}
    shown = ["torch", "triton", "transformers", "trl", "peft", "bitsandbytes"]
    shown += [
        n for n, stack in (("liger-kernel", "liger"), ("unsloth", "unsloth")) if stack in stacks
    ]
    versions = source.content.get("versions", {})
    named = ", ".join(f"{name} {versions[name]}" for name in shown if name in versions)
    card = "CPU" if source.card == "none" else source.card
    note = f" ({note})" if (note := source.content.get("note")) else ""
    return f"{card}; {named}; commit {source.content.get('commit') or 'unknown'}{note}."


def _write_caption(figure: Any, lines: list[str], top: float) -> None:
    """``top`` in inches from the lower edge."""
    place = top / figure.get_figheight()
    figure.text(0.01, place, "\n".join(lines), fontsize=7, va="top", linespacing=1.4)


LINE = 0.14  # inches of a caption's line


def _bars(shown: list[Work], caption: str, *, legend: float, height: float = 0.19) -> Any:
    """A figure with a panel a work, one below the other, as many bars high as it has entries."""
    pyplot = _style()
    lines = _caption(caption, (entry.source for work in shown for entry in work.entries))
    below = 0.55 + LINE * len(lines)
    counts = [len(work.entries) for work in shown]
    gap = 0.36
    total = legend + sum(counts) * height + gap * len(counts) + below
    figure = pyplot.figure(figsize=(8.6, total))
    top, panels = total - legend, []
    for work, count in zip(shown, counts, strict=True):
        top -= gap
        axes = figure.add_axes(
            (0.22, (top - count * height) / total, 0.725, count * height / total)
        )
        top -= count * height
        axes.set_ylim(count - 0.5, -0.5)
        axes.set_yticks(range(count), [entry.name for entry in work.entries])
        axes.tick_params(axis="y", length=0)
        axes.spines["bottom"].set_visible(False)
        axes.spines["left"].set_visible(False)
        axes.set_title(work.title, pad=4)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        panels.append(axes)
        for axis in panels[:-1]:
            axis.tick_params(axis="x", length=0, labelbottom=False)
    _write_caption(figure, lines, below - 0.45)
    return figure, panels


def memory(shown: list[Work]) -> Any:
    """Peak memory by stack and work, against the card."""
    caption = (
        "GiB that PyTorch's allocator reserved at most, loading included. The mark on a bar is "
        "what was measured; its parts are what gemma_accel.plan predicts. Stacks that it knows "
        "nothing about are not split, and bars with an arrow go on."
    )
    shown = [work.showing(_of_interest(work)) for work in shown]
    figure, panels = _bars(shown, caption + _asterisk(shown), legend=0.42)
    highest = CARD_GIB
    for axes, work in zip(panels, shown, strict=True):
        for place, entry in enumerate(work.entries):
            if entry.peak_gib is None:
                axes.text(0.08, place, _failure(entry), va="center", style="italic")
                continue
            highest = max(highest, _draw_memory(axes, place, work.name, entry))
    for axes in panels:
        axes.set_xlim(0, min(highest, CUT_GIB) * 1.08)
        for limit, style in ((USABLE_GIB, (0, (4, 2))), (CARD_GIB, "solid")):
            axes.axvline(limit, color=TEXT, linewidth=1.1, linestyle=style, zorder=0.5)
    kwargs = {"fontsize": 7.5, "va": "bottom", "transform": panels[0].get_xaxis_transform()}
    panels[0].text(USABLE_GIB, 1.02, "7 GiB, usable ", ha="right", **kwargs)
    panels[0].text(CARD_GIB, 1.02, " 8 GiB, the card", ha="left", **kwargs)
    panels[-1].set_xlabel("GiB")
    _memory_legend(figure)
    return figure


def _of_interest(work: Work) -> list[Entry]:
    """Ours without a limit takes what a large card has; beside ours with one it says nothing."""
    ours = [entry for entry in work.entries if entry.stack == "gemma_accel"]
    boring = [e for e in ours if not e.limited] if any(e.limited for e in ours) else []
    return [entry for entry in work.entries if entry not in boring]


def _failure(entry: Entry) -> str:
    error = entry.error or "no result"
    return "out of memory" if "out of memory" in error.lower() else "failed"


def _draw_memory(axes: Any, place: int, work: str, entry: Entry) -> float:
    """One bar; returns how far it reaches."""
    left, split = 0.0, parts(work, entry)
    for part, size in (split or {}).items():
        axes.barh(place, size, left=left, height=0.66, color=PARTS[part][0], alpha=0.8, linewidth=0)
        left += size
    if split is None:
        left = entry.peak_gib
        axes.barh(place, left, height=0.66, color=MEASURED, alpha=0.45, linewidth=0)
    if entry.peak_gib > CUT_GIB:
        text = f"{entry.peak_gib:.2f} →"
        axes.text(CUT_GIB * 1.06, place, text, ha="right", va="center", fontweight="bold")
        return CUT_GIB
    axes.plot([entry.peak_gib] * 2, [place - 0.44, place + 0.44], color=TEXT, linewidth=2.2)
    end = max(left, entry.peak_gib)
    beside = next((line for line in (USABLE_GIB, CARD_GIB) if end < line < end + 0.75), end)
    axes.text(beside + 0.08, place, f"{entry.peak_gib:.2f}", va="center", fontweight="bold")
    return end


def _memory_legend(figure: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, alpha=0.8, lw=0) for colour, _ in PARTS.values()]
    handles += [Patch(color=MEASURED, alpha=0.45, lw=0), Line2D([], [], color=TEXT, lw=2.2)]
    names = [*PARTS, "not split", "measured"]
    figure.legend(
        handles,
        names,
        loc="upper left",
        ncols=4,
        bbox_to_anchor=(0.0, 1.0),
        handlelength=1.2,
        columnspacing=1.4,
    )


def _asterisk(shown: list[Work]) -> str:
    if any(entry.borrowed for work in shown for entry in work.entries):
        return " * measured in another run on the same card."
    return ""


def speed(shown: list[Work]) -> Any:
    """Tokens a second by stack and work."""
    caption = (
        "Tokens a second over whole optimizer steps, the median after warming up. Stacks take "
        "their steps in turn on one card; × is against TRL in the same run. W6 counts text and "
        "soft tokens."
    )
    if apart := [w.name for w in shown if any(e.source.apart for e in w.entries)]:
        caption += f" Stacks of {', '.join(apart)} ran one after the other."
    shown = [
        work.showing(kept)
        for work in shown
        if (kept := [e for e in work.entries if e.tokens_per_second or e.error])
    ]
    figure, panels = _bars(shown, caption + _asterisk(shown), legend=0.0)
    speeds = [e.tokens_per_second or 0 for work in shown for e in work.entries]
    for axes, work in zip(panels, shown, strict=True):
        axes.set_xlim(0, max(speeds) * 1.2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        for place, entry in enumerate(work.entries):
            if (rate := entry.tokens_per_second) is None:
                axes.text(max(speeds) * 0.006, place, _failure(entry), va="center", style="italic")
                continue
            axes.barh(place, rate, height=0.66, color=STACKS[entry.stack][1], alpha=0.85, lw=0)
            says = f" {rate:,.0f}"
            if entry.stack != "trl" and (base := _stock_beside(entry, work.name)):
                says += f"   ×{rate / base:.2f}"
            axes.text(rate, place, says, va="center", fontweight="bold")
    panels[-1].set_xlabel("tokens a second")
    return figure


def _stock_beside(entry: Entry, work: str) -> float | None:
    """Stock's tokens a second in the run that the entry is of."""
    rows = [row for row in entry.source.of(work) if row["stack"] == "trl" and not row["cap_gib"]]
    return Entry("trl", "trl", rows, entry.source).tokens_per_second if rows else None


def length(shown: list[Work]) -> Any:
    """Memory against the tokens of a step, up to the longest row that fits."""
    measured = [
        (WORKS[work.name], entry)
        for work in shown
        if work.name in WORKS and WORKS[work.name].model == "e2b" and WORKS[work.name].quantised
        for entry in _of_interest(work)
        if entry.peak_gib is not None
    ]
    caption = _caption(
        "E2B, NF4, LoRA of rank 16. Points are measured: GiB reserved at most, loading included. "
        "Lines are what gemma_accel.plan predicts for one row: given 7 GiB, which it fills with "
        "what it then need not compute again; with the least it can do with; and stock TRL.",
        (entry.source for _, entry in measured),
    )
    below = 0.6 + LINE * len(caption)
    total = 3.9 + below
    figure = _style().figure(figsize=(8.6, total))
    axes = figure.add_axes((0.055, below / total, 0.9, 3.8 / total))
    _draw_lengths(axes)
    _draw_measured(axes, measured)
    for limit, dashes, says in _LIMITS:
        axes.axhline(limit, color=TEXT, lw=0.9, linestyle=dashes, zorder=0.5)
        axes.text(LENGTHS[0] * 1.02, limit + 0.08, says, fontsize=7.5, va="bottom")
    axes.set_xscale("log", base=2)
    axes.set_xlim(LENGTHS[0], LENGTHS[-1] * 1.25)  # room for the last point and its name
    axes.set_ylim(0, TOP)
    ticks = [2**n for n in range(8, 18)]
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.minorticks_off()
    axes.grid(axis="y")
    axes.set_xlabel("tokens in a step")
    axes.set_ylabel("GiB")
    _write_caption(figure, caption, below - 0.5)
    return figure


_LIMITS = ((USABLE_GIB, (0, (4, 2)), "7 GiB, usable"), (CARD_GIB, "solid", "8 GiB, the card"))
LENGTHS = [round(256 * 2 ** (n / 4)) for n in range(37)]
TOP = 14.0  # GiB


def _draw_lengths(axes: Any) -> None:
    """The planner's three curves, each with its name, and the longest row."""
    longest = plan_of("W1", USABLE_GIB, 64).longest_sequence
    made = {n: plan_of("W1", USABLE_GIB, n) for n in sorted({*LENGTHS, longest})}
    other = {n: m.choices["alternatives"] for n, m in made.items()}
    given = {n: m.peak_gib for n, m in made.items() if n <= longest}
    least = {
        n: max(made[n].load_peak_gib, min(a[k] for k in a if k.startswith("every layer")))
        for n, a in other.items()
    }
    stock = {n: max(a["stock TRL, training"], a["stock TRL, loading"]) for n, a in other.items()}
    blue, grey = STACKS["gemma_accel"][1], STACKS["trl"][1]
    axes.plot(list(stock), list(stock.values()), color=grey, lw=1.8)
    axes.plot(list(given), list(given.values()), color=blue, lw=1.8)
    axes.plot(list(least), list(least.values()), color=blue, lw=1.8, linestyle=(0, (1, 1.2)))
    over = next(n for n in stock if stock[n] > TOP - 2.2)
    axes.text(over * 0.9, TOP - 2.2, "TRL, predicted", ha="right", va="bottom")
    axes.text(11_000, USABLE_GIB + 0.12, "gemma_accel given 7 GiB, predicted", va="bottom")
    axes.text(LENGTHS[0] * 1.02, least[LENGTHS[0]] + 0.12, "the least, predicted", va="bottom")
    axes.plot([longest] * 2, [0, USABLE_GIB], color=blue, lw=0.9, linestyle=(0, (2, 2)))
    says = f"longest row in 7 GiB,\npredicted: {longest:,} tokens"
    axes.text(longest * 0.96, 1.4, says, ha="right", va="bottom")


def _draw_measured(axes: Any, measured: list[tuple[Any, Entry]]) -> None:
    for stack, (name, colour) in STACKS.items():
        points = [(shape.tokens, e.peak_gib) for shape, e in measured if e.stack == stack]
        inside = [(tokens, gib) for tokens, gib in points if gib <= TOP]
        if inside:
            x, y = zip(*inside, strict=True)
            axes.scatter(x, y, s=42, color=colour, edgecolor=TEXT, lw=0.8, zorder=3, label=name)
        for tokens, gib in points:
            if gib > TOP:
                axes.scatter([tokens], [TOP - 0.15], s=42, marker="^", color=colour, zorder=3)
                axes.text(tokens * 1.06, TOP - 0.15, f"{gib:.1f}", va="center")
    for shape in {shape.name: shape for shape, _ in measured}.values():
        says = f"{shape.name}\n{shape.batch_size} × {shape.sequence_length:,}"
        axes.text(shape.tokens, 0.2, says, ha="center", va="bottom", fontsize=7)
    if measured:
        axes.legend(loc="upper left", title="measured", alignment="left")


# -- losses ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curves:
    """The losses of each stack's seeds, step by step."""

    title: str
    source: Results
    steps: list[int]
    stock: list[list[float]]
    ours: list[list[float]]
    control: list[list[float]] = field(default_factory=list)


def loss_curves(results: Sequence[Results]) -> list[Curves]:
    """The works that have several seeds of stock and of ours in one file; ours with its own cap
    where there are several.
    """
    found = []
    for name in WORKS:
        for file in results:
            rows = [r for r in file.of(name) if "losses" in r]
            stock = [r["losses"] for r in rows if r["stack"] == "trl"]
            labels = sorted({r["label"] for r in rows if r["stack"] == "gemma_accel"})
            ours = [r["losses"] for r in rows if labels and r["label"] == labels[0]]
            if len(stock) > 1 and len(ours) > 1:
                steps = list(range(1, 1 + min(map(len, stock + ours))))
                title = f"{name}: {MODELS[WORKS[name].model]}, random weights"
                found.append(Curves(title, file, steps, stock, ours))
                break
    return found


def learning_curves(results: Sequence[Results]) -> list[Curves]:
    """Training and held-out loss of the learning curve; a card's before a CPU's."""
    from benchmarks.learning_curve import CONTROL

    files = [r for r in results if any(row.get("work") == "curve" for row in r.rows)]
    files = [r for r in files if not any("error" in row for row in r.rows)]
    if not files:
        return []
    file = min(files, key=lambda r: (r.card == "none", r.name))
    by_stack = {
        s: [r for r in file.rows if r["stack"] == s] for s in ("trl", "gemma_accel", CONTROL)
    }
    training = [[row["losses"] for row in rows] for rows in by_stack.values()]
    held_out = [[row["eval_losses"] for row in rows] for rows in by_stack.values()]
    first = file.rows[0]
    steps = list(range(1, 1 + len(first["losses"])))
    return [
        Curves("training loss", file, steps, *training),
        Curves("held-out loss", file, first["eval_steps"], *held_out),
    ]


def _mean(runs: Sequence[Sequence[float]], count: int) -> list[float]:
    return [statistics.fmean(run[step] for run in runs) for step in range(count)]


def _band(runs: Sequence[Sequence[float]], around: Sequence[float]) -> list[list[float]]:
    """The lowest and the highest of the runs at each step, from ``around``."""
    steps = range(len(around))
    return [[pick(run[n] for run in runs) - around[n] for n in steps] for pick in (min, max)]


def _draw_curves(axes: Any, curves: Curves, *, difference: bool = False) -> None:
    """Stock's seeds as a band and their mean as a broad line, ours as a thin one on it.

    ``difference``: all of it from stock's mean, and the control beside it.
    """
    count = len(curves.steps)
    stock = _mean(curves.stock, count)
    zero = stock if difference else [0.0] * count
    low, high = _band(curves.stock, zero)
    grey = STACKS["trl"][1]
    axes.fill_between(curves.steps, low, high, color=grey, alpha=0.28, lw=0)
    drawn = [(stock, grey, 4.0)]
    if difference and curves.control:
        drawn.append((_mean(curves.control, count), CONTROL_COLOUR, 1.2))
    drawn.append((_mean(curves.ours, count), STACKS["gemma_accel"][1], 1.3))
    for mean, colour, width in drawn:
        height = [value - base for value, base in zip(mean, zero, strict=True)]
        axes.plot(curves.steps, height, color=colour, lw=width, alpha=0.8 if width > 2 else 1)
    axes.set_title(curves.title + (", from TRL's mean" if difference else ""))
    axes.set_xlabel("optimizer step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y")


CONTROL_COLOUR = "#e69f00"


def _panels(count: int, lines: list[str], *, control: bool) -> Any:
    """Panels in two or three columns, a legend for all of them above, a caption below."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    columns = 3 if count == 3 else 2
    rows = -(-count // columns)
    above, height, below = 0.3, 3.1 if columns == 2 else 2.5, 0.2 + LINE * len(lines)
    total = above + rows * (height + 0.75) + below
    figure = _style().figure(figsize=(8.6, total))
    panels = []
    for n in range(count):
        left = 0.055 + (n % columns) / columns
        bottom = total - above - (height + 0.75) * (n // columns + 1) + 0.45
        size = (0.93 / columns - 0.045, height / total)
        panels.append(figure.add_axes((left, bottom / total, *size)))
    grey, blue = STACKS["trl"][1], STACKS["gemma_accel"][1]
    handles = [
        Patch(color=grey, alpha=0.28, lw=0, label="TRL, its seeds"),
        Line2D([], [], color=grey, lw=4, alpha=0.8, label="TRL, mean"),
        Line2D([], [], color=blue, lw=1.3, label="gemma_accel, mean"),
    ]
    if control:
        says = "TRL with eager attention, mean"
        handles.append(Line2D([], [], color=CONTROL_COLOUR, lw=1.2, label=says))
    figure.legend(handles=handles, loc="upper left", ncols=4, bbox_to_anchor=(0.0, 1.0))
    _write_caption(figure, lines, below - 0.05)
    return figure, panels


def losses(of_works: list[Curves], learning: list[Curves]) -> Any:
    """Loss curves of stock and ours on each other, and the learning curve's differences."""
    caption = "Cross entropy of each optimizer step, nats a token. A seed is an order of the data"
    caption += ", and of the learning curve the first weights too." if learning else "."
    if control := any(curves.control for curves in learning):
        caption += " Eager attention is stock's own other implementation: rounding, and no more."
    every = [*of_works, *learning]
    lines = _caption(caption, (curves.source for curves in every))
    figure, panels = _panels(len(every), lines, control=control)
    for n, (axes, curves) in enumerate(zip(panels, every, strict=True)):
        _draw_curves(axes, curves, difference=n >= len(of_works))
    return figure


def learning_curve(learning: list[Curves]) -> Any:
    """A small Gemma 4 that learns real text from nothing."""
    content = learning[0].source.content
    parameters = next(r["parameters"] for r in content["rows"] if "parameters" in r)
    size = content["size"]
    caption = (
        f"Gemma 4 with {parameters / 1e6:.1f} M parameters, all trained from random weights on "
        f"Python's documentation, {size['batch_size']} × {size['length']} tokens a step, "
        f"{len(learning[0].stock)} seeds; nats a token. "
    )
    for curves in learning:
        gap, spread = compare(curves.stock, curves.ours)
        caption += (
            f"{curves.title.capitalize()}: largest gap of the means {gap:.3f}, TRL's own spread "
            f"{spread:.3f}. "
        )
    lines = _caption(caption, [learning[0].source])
    figure, panels = _panels(len(learning), lines, control=False)
    for axes, curves in zip(panels, learning, strict=True):
        _draw_curves(axes, curves)
    return figure


# -- all of them ----------------------------------------------------------------------------------


def draw(results: list[Results], log: Any = print) -> dict[str, Any]:
    """The figures by name; what is missing is said to ``log``."""
    figures: dict[str, Any] = {}
    shown = works(results)
    if missing := [name for name in ORDER if name not in {work.name for work in shown}]:
        log(f"left out of memory, speed and length: {', '.join(missing)}: no result")
    for work in shown:
        if absent := [s for s in STACKS if s not in {e.stack for e in work.entries}]:
            log(f"left out of {work.name}: {', '.join(absent)}: no result")
    if any(entry.peak_gib for work in shown for entry in work.entries):
        figures["memory"], figures["speed"] = memory(shown), speed(shown)
        figures["length"] = length(shown)
    several, learning = loss_curves(results), learning_curves(results)
    if not several:
        log("left out of losses: every work: no file has several seeds of trl and gemma_accel")
    if not learning:
        log("left out: the learning curve: no result")
    if several or learning:
        figures["losses"] = losses(several, learning)
    if learning:
        figures["learning-curve"] = learning_curve(learning)
    return figures


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE / "plots")
    parser.add_argument("--format", default="svg", help="svg, or png to look at")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, figure in draw(read(options.results)).items():
        path = options.out / f"{name}.{options.format}"
        metadata = {"Date": None, "Creator": "benchmarks.plots"} if options.format == "svg" else {}
        figure.savefig(path, metadata=metadata, dpi=110)
        print(f"{path.name} written")


if __name__ == "__main__":
    main()
