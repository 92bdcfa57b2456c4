"""The pictures: which figures are drawn, what is said to be missing, and that both themes can be
read.
"""

from __future__ import annotations

import json
import statistics

import pytest

pytest.importorskip("matplotlib")

from benchmarks import plots  # noqa: E402
from benchmarks.learning_curve import CONTROL  # noqa: E402
from benchmarks.works import WORKS, plan_of  # noqa: E402

CARD = "NVIDIA Test 8GB"
VERSIONS = {"torch": "2.11.0", "trl": "1.15.0", "unsloth": "2026.10.9", "liger-kernel": "0.8.5"}


def row(work, label, peak=None, step=None, **changes):
    stack, _, cap = label.partition("@")
    stack, _, limit = stack.partition(":")
    shape = WORKS.get(work)
    made = {"work": work, "stack": stack, "label": label, "cap_gib": float(cap) if cap else None}
    if shape:
        made |= {"batch_size": shape.batch_size, "sequence_length": shape.sequence_length}
        made |= {"vram_gib": float(limit) if limit else None, "float32": False, "seed": 0}
    if peak is None:
        made["error"] = "exit 1: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate"
    else:
        made |= {"peak_reserved_gib": peak, "step_s": step, "losses": [12.8, 12.7, 12.6]}
    return {**made, **changes}


def write(directory, name, rows, **changes):
    where = {"card": CARD, "date": "2026-11-24", "versions": VERSIONS, "commit": "abc1234"}
    (directory / name).write_text(json.dumps({**where, **changes, "rows": rows}))


def curve_rows():
    rows = []
    for seed in range(3):
        for n, stack in enumerate(("trl", "gemma_accel", CONTROL)):
            losses = [7 - 0.1 * step + 0.2 * seed + 0.01 * n for step in range(6)]
            one = {"work": "curve", "stack": stack, "seed": seed, "parameters": 5_153_216}
            evals = {"eval_steps": [0, 3, 6], "eval_losses": losses[::2]}
            rows.append({**one, "losses": losses, **evals})
    return rows


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("results")
    rows = [
        row("W1", label, peak, step, seed=seed, losses=[12.8 + 0.01 * seed, 12.7 - 0.02 * seed])
        for seed in range(3)
        for label, peak, step in (
            ("trl", 8.57, 0.9 + 0.1 * seed),
            ("liger", 8.29, 0.8),
            ("gemma_accel@7", 6.97 - 0.1 * seed, 0.25),
            ("gemma_accel:3.0@7", 3.0, 0.5),
        )
    ]
    rows.append(row("W1", "trl", 14.0, 1.0, float32=True))  # another load, not this work
    rows += [row("W4", "trl@7"), row("W4", "gemma_accel@7", 6.9, 9.0)]
    write(directory, "test-train.json", rows)
    write(directory, "test-unsloth.json", [row("W1", "unsloth", 4.43, 0.97)])
    write(directory, "test-older.json", [row("W1", "trl", 9.99, 2.0)], date="2026-11-01")
    rows = [row("W3", "trl", 11.0, 2.0), row("W3", "liger", 43.76, 2.0)]
    write(directory, "other-card.json", rows, card="another", command="train_step --apart")
    media = {"text_tokens": 512, "soft_tokens": 560}
    rows = [row("images", label, peak, 0.5, **media) for label, peak in (("trl", 9.9), MEDIA)]
    write(directory, "test-media.json", [*rows, row("images", "gemma_accel", 30.0, 0.2, **media)])
    size = {"batch_size": 8, "length": 256}
    write(directory, "test-learning-curve.json", curve_rows(), size=size)
    (directory / "kernels.json").write_text(json.dumps([{"case": "not ours"}]))
    return directory


MEDIA = ("gemma_accel@7", 5.1)


@pytest.fixture(scope="module")
def drawn(results):
    said = []
    return plots.draw(plots.read(results), said.append), said


def entries(results, name):
    (work,) = [work for work in plots.works(plots.read(results)) if work.name == name]
    return {entry.name: entry for entry in work.entries}


def texts(figure):
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text)]


class TestWhatIsChosen:
    def test_one_run_and_what_only_another_has_with_an_asterisk(self, results):
        found = entries(results, "W1")
        names = ["TRL", "TRL + Liger", "Unsloth*", "gemma_accel, 7 GiB", "gemma_accel, vram_gib=3"]
        assert list(found) == names
        assert found["TRL"].source.name == "test-train.json"

    def test_seeds_highest_memory_and_median_step(self, results):
        found = entries(results, "W1")
        assert found["gemma_accel, 7 GiB"].peak_gib == 6.97
        assert found["TRL"].tokens_per_second == pytest.approx(4096 / 1.0)

    def test_media_count_text_and_soft_tokens(self, results):
        assert entries(results, "images")["TRL"].tokens_per_second == pytest.approx(1072 / 0.5)

    def test_a_work_that_only_another_card_has_says_so(self, results):
        titles = {work.name: work.title for work in plots.works(plots.read(results))}
        assert titles["W3"] == "W3  E2B, NF4, 1 × 8,192 tokens, on another"
        assert titles["W4"] == "W4  E2B, NF4, 1 × 65,536 tokens"


class TestParts:
    def test_they_add_up_to_what_is_predicted(self, results):
        found = entries(results, "W1")
        made = plan_of("W1", 3.0)
        ours = plots.parts("W1", found["gemma_accel, vram_gib=3"])
        assert sum(ours.values()) == pytest.approx(made.peak_gib)
        assert ours["per-layer table"] == ours["towers"] == 0
        stock = plots.parts("W1", found["TRL"])
        predicted = made.choices["alternatives"]["stock TRL, training"]
        assert sum(stock.values()) == pytest.approx(predicted)
        assert stock["per-layer table"] == pytest.approx(4.375, abs=0.01)
        assert stock["weights"] == pytest.approx(ours["weights"])
        assert min(stock.values()) > 0

    def test_no_component_is_forgotten(self):
        drawn = {name for _, names in plots.PARTS.values() for name in names}
        for work in ("W1", "W4", "W5"):
            parts = plan_of(work, 7.0).components
            assert {name for name in parts if not name.endswith("(host)")} <= drawn

    def test_what_the_planner_does_not_know_is_not_split(self, results):
        assert plots.parts("W1", entries(results, "W1")["TRL + Liger"]) is None

    def test_media_are_planned_too(self, results):
        for name in ("images", "sound"):
            made = plan_of(name, 7.0)
            drawn = {name for _, names in plots.PARTS.values() for name in names}
            assert {n for n in made.components if not n.endswith("(host)")} <= drawn
        made = plan_of("images", 7.0)
        stock = plots.parts("images", entries(results, "images")["TRL"])
        assert sum(stock.values()) == pytest.approx(
            made.choices["alternatives"]["stock TRL, training"]
        )
        assert stock["towers"] == pytest.approx(0.25, abs=0.01)  # both

    def test_a_bar_that_would_leave_no_room_for_the_others_is_cut(self, drawn):
        assert "43.76 →" in texts(drawn[0]["memory"])


class TestDrawn:
    def test_everything(self, drawn):
        assert list(drawn[0]) == ["memory", "speed", "length", "losses", "learning-curve"]

    def test_what_is_missing_is_said(self, drawn):
        said = "\n".join(drawn[1])
        assert "W2, W5, short, longest, photos, sound: no result" in said
        assert "left out of W4: liger, unsloth" in said

    def test_memory_shows_what_was_measured(self, drawn):
        shown = texts(drawn[0]["memory"])
        assert {"8.57", "8.29", "4.43", "6.97", "3.00", "6.90", "9.90", "5.10"} <= set(shown)
        assert "out of memory" in shown and "W4  E2B, NF4, 1 × 65,536 tokens" in shown
        assert "11.00" in shown  # a work that only another card has
        assert not {"9.99", "14.00", "30.00"} & set(shown)  # another run, load, limit

    def test_the_marks_are_the_measured_totals(self, drawn):
        axes = drawn[0]["memory"].axes[0]
        marks = [line.get_xdata()[0] for line in axes.lines if line.get_linewidth() == 2.2]
        assert marks == [8.57, 8.29, 4.43, 6.97, 3.0]

    def test_speed_compares_within_a_run_only(self, drawn):
        shown = [text.strip() for text in texts(drawn[0]["speed"])]
        assert "4,096" in shown and "16,384   ×4.00" in shown
        assert "4,223" in shown  # Unsloth's, of another run: no ratio

    def test_speed_says_what_did_not_run_in_turn(self, drawn):
        shown = " ".join(texts(drawn[0]["speed"])).replace("\n", " ")
        assert "Stacks of W3 ran one after the other." in shown

    @pytest.mark.parametrize("name", ["memory", "speed", "length", "losses", "learning-curve"])
    def test_card_versions_and_commit_are_in_the_caption(self, drawn, name):
        shown = " ".join(texts(drawn[0][name])).replace("\n", " ")
        for fact in (CARD, "torch 2.11.0", "trl 1.15.0", "abc1234"):
            assert fact in shown
        assert ("unsloth 2026.10.9" in shown) == (name in ("memory", "speed", "length"))

    def test_length_has_points_and_curves_and_the_longest_row(self, drawn):
        figure = drawn[0]["length"]
        longest = plan_of("W1", 7.0, 64).longest_sequence
        assert any(f"{longest:,} tokens" in text for text in texts(figure))
        points = [tuple(p) for c in figure.axes[0].collections for p in c.get_offsets().tolist()]
        assert (4096, 8.57) in points and (65536, 6.9) in points
        curves = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 20]
        assert len(curves) == 3
        to_the_longest = [line for line in curves if max(line.get_xdata()) == longest]
        assert min(max(line.get_ydata()) for line in to_the_longest) <= 7.0 + 1e-6

    def test_curves_lie_where_the_means_are(self, drawn):
        w1, training, held_out = drawn[0]["losses"].axes
        stock, ours = w1.lines
        mean = [statistics.fmean(12.8 + 0.01 * s for s in range(3))]
        assert list(stock.get_ydata())[:1] == pytest.approx(mean)
        assert list(stock.get_ydata()) == list(ours.get_ydata())
        for axes in (training, held_out):  # differences from stock's mean
            stock, control, ours = axes.lines
            assert set(stock.get_ydata()) == {0}
            assert list(ours.get_ydata()) == pytest.approx([0.01] * len(ours.get_ydata()))
            assert list(control.get_ydata()) == pytest.approx([0.02] * len(ours.get_ydata()))
        assert "spread 0.200" in " ".join(texts(drawn[0]["learning-curve"]))


def test_without_results_nothing_is_drawn_and_all_is_said(tmp_path):
    said = []
    assert plots.draw(plots.read(tmp_path), said.append) == {}
    assert "W1, W2, W3, W4, W5, short, longest, images, photos, sound" in said[0]
    assert any("learning curve" in line for line in said)


def test_the_committed_results_can_be_drawn():
    assert {"memory", "speed", "length"} <= set(plots.draw(plots.read(plots.HERE / "results")))


def test_the_same_bytes_each_time(results, tmp_path, capsys):
    for name in ("one", "two"):
        plots.main(["--results", str(results), "--out", str(tmp_path / name)])
    assert "memory.svg written" in capsys.readouterr().out
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) == 5
    for name in files:
        one, two = ((tmp_path / run / name).read_bytes() for run in ("one", "two"))
        assert one == two
        assert b"<dc:date>" not in one


def luminance(colour):
    channels = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(c * weight for c, weight in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("background", ["#ffffff", "#0d1117"])  # GitHub's light and dark
def test_both_themes_can_be_read(background, drawn):
    assert contrast(plots.TEXT, background) > 4
    for colour in [c for _, c in plots.STACKS.values()] + [c for c, _ in plots.PARTS.values()]:
        assert contrast(colour, background) > 2
    for figure in drawn[0].values():
        assert figure.get_facecolor()[3] == 0
        assert all(axes.get_facecolor()[3] == 0 for axes in figure.axes)
