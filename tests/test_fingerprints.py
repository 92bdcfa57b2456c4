"""Fingerprints: every seam of the installed versions is known; a changed one is left stock and said
so; the rest is patched all the same.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import linecache
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.models.gemma4 import modeling_gemma4 as gemma4

import gemma_accel
from gemma_accel import fingerprints, patching
from gemma_accel.fingerprints import KNOWN, SEAMS, TESTED, fingerprint, fingerprint_in, why_not
from gemma_accel.hookspecs import Patch, hookimpl
from gemma_accel.patches.seams import ClassSwap, Fused
from tests import media
from tests.tiny import batch, tiny_model

pytestmark = pytest.mark.usefixtures("references")

GEMMA = "transformers.models.gemma4.modeling_gemma4"
SITE = Path(transformers.__file__).parent.parent
BUILT_IN = {patch.name: patch for patch in patching.registry().patches()}


def outputs(model):
    inputs = batch()
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach()[inputs["attention_mask"].bool()], grads


def assert_alike(model, stock):
    """Logits and every gradient, within float32's roundings over five layers."""
    (logits, grads), (expected, stocks) = outputs(model), outputs(stock)
    assert (logits - expected).norm() <= 1e-5 * expected.norm()
    assert grads.keys() == stocks.keys()
    for name, grad in grads.items():
        assert (grad - stocks[name]).norm() <= 1e-4 * stocks[name].norm() + 1e-7, name


def skips(report):
    return {record.patch: record.reason for record in report.skipped}


# --- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", BUILT_IN)
def test_what_is_installed_is_what_the_patch_was_written_for(patch):
    import bitsandbytes  # noqa: F401  # so that PEFT's layers for it are looked at too

    assert patch in SEAMS
    assert why_not(patch) is None


@pytest.mark.parametrize("patch", [p for p in BUILT_IN.values() if isinstance(p, ClassSwap)])
def test_what_a_fused_class_overrides_is_among_its_seams(patch):
    """The table is written by hand; this is what it may not forget."""
    fused = patch.fused
    names = set(SEAMS[patch.name])
    for name in vars(fused):
        if inspect.isfunction(vars(fused)[name]) and hasattr(fused.stock, name):
            home = next(c for c in fused.stock.__mro__ if name in vars(c))
            if home.__module__ == GEMMA:
                own = {home.__name__, f"{home.__name__}.{name}"}
                assert own & names, f"{patch.name} overrides {home.__name__}.{name}"


def test_names_are_of_known_places_and_of_one_only():
    named = [name for names in KNOWN.values() for name in names]
    assert len(named) == len(set(named))
    assert {name for names in SEAMS.values() for name in names} == set(named)


@pytest.mark.parametrize("module", KNOWN)
def test_files_and_live_code_have_the_same_fingerprints(module):
    """So a maintainer can take a version's from an unpacked wheel."""
    site = Path(importlib.import_module(module.split(".")[0]).__file__).parent.parent
    for name in KNOWN[module]:
        assert fingerprint_in(site, module, name) == fingerprint(module, name), name


def test_a_maintainer_gets_lines_that_hold_what_is_installed(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "gemma_accel.fingerprints", str(SITE)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ast.literal_eval("{" + done.stdout + "}") == KNOWN
    assert "# new" not in done.stdout
    # another version: one function differs, another is gone
    path = tmp_path.joinpath(*GEMMA.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True)
    source = Path(gemma4.__file__).read_text()
    source = source.replace("self.act_fn(self.gate_proj(x))", "self.act_fn(self.up_proj(x))")
    path.write_text(source.replace("def rotate_half", "def rotate_third"))
    for other in (name for name in KNOWN if name.startswith("transformers.") and name != GEMMA):
        there = tmp_path.joinpath(*other.split(".")).with_suffix(".py")
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_text(SITE.joinpath(*other.split(".")).with_suffix(".py").read_text())
    lines = "\n".join(fingerprints._table([tmp_path])).splitlines()
    new = {line.split('"')[1] for line in lines if line.endswith("# new")}
    assert new == {"Gemma4TextMLP", "Gemma4VisionMLP", "rotate_half"}
    table = ast.literal_eval("{" + "\n".join(lines) + "}")
    assert table[GEMMA]["rotate_half"][-1] == fingerprints.ABSENT


def test_sources_are_read_once():
    fingerprints._of_live.cache_clear()
    assert not any(map(why_not, SEAMS))
    read = fingerprints._of_live.cache_info().misses
    assert read
    assert not any(map(why_not, SEAMS))
    assert fingerprints._of_live.cache_info().misses == read


# --- what counts as a change ----------------------------------------------------------------------

WRITTEN = '''
class Thing:
    def forward(self, x: Tensor, scale=1.0) -> Tensor:
        """Doubles."""
        y: Tensor = x * 2  # twice
        return y * scale
'''
SAME = [
    WRITTEN.replace("# twice", "# two times"),
    WRITTEN.replace('"""Doubles."""\n', "\n"),
    WRITTEN.replace("x: Tensor", "x").replace(" -> Tensor", ""),
    WRITTEN.replace("y: Tensor = x * 2", "y = x * 2"),
    WRITTEN.replace("y: Tensor", "y: int\n        y: float"),
    WRITTEN.replace("x * 2  # twice", "(\n            x\n            * 2\n        )"),
    WRITTEN.replace("    def", "    @auto_docstring(custom_intro='A thing.')\n    def"),
    WRITTEN.replace("class Thing:", "class Thing:\n    kind = 'a'\n"),
]
OTHER = [
    WRITTEN.replace("x * 2", "x * 3"),
    WRITTEN.replace("x * 2", "x + 2"),
    WRITTEN.replace("x * 2", "x * 2.0"),
    WRITTEN.replace("scale=1.0", "scale=2.0"),
    WRITTEN.replace("return y * scale", "return y"),
    WRITTEN.replace("    def", "    @torch.no_grad()\n    def"),
    WRITTEN.replace("def forward", "def backward"),
    WRITTEN + "\n    def more(self):\n        pass\n",
]


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The fingerprints of sources, read as files and as live code."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(fingerprints, "_is_foreign", lambda function: False)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    count = iter(range(100))

    def of(source):
        module = f"written_{next(count)}"
        prelude = "import torch\nfrom torch import Tensor\n"
        prelude += "def auto_docstring(**_):\n    return lambda f: f\n"
        (tmp_path / f"{module}.py").write_text(prelude + source)
        importlib.invalidate_caches()
        found = fingerprint_in(tmp_path, module, "Thing")
        assert fingerprint(module, "Thing") == found
        return found

    return of


def test_layout_comments_docstrings_and_annotations_do_not_count(written):
    expected = written(WRITTEN)
    for source in SAME:
        assert source != WRITTEN
        assert written(source) == expected, source


def test_anything_else_counts(written):
    found = [written(source) for source in (WRITTEN, *OTHER)]
    assert len(set(found)) == len(found)


def test_a_fingerprint_does_not_depend_on_pythons_version():
    """Newer ones put more fields into a tree, and leave empty ones out of a dump."""
    tree = ast.parse(textwrap.dedent(WRITTEN))
    (function,) = tree.body[0].body
    plain = fingerprints._plain(function)
    function.type_params = []
    assert fingerprints._plain(function) == plain
    del function.type_comment, function.returns
    assert fingerprints._plain(function) == plain


# --- a seam that changed --------------------------------------------------------------------------


def changed_mlp(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 1.5)


def changed_norm(self, hidden_states):
    return self._norm(hidden_states.float()).type_as(hidden_states) * 2


def compiled_from_text(source, *, readable):
    """A forward made at run time, with or without a source that Python can find."""
    name = f"<made, readable: {readable}>"
    scope = {"F": F, "__name__": GEMMA}
    exec(compile(source, name, "exec"), scope)
    if readable:
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    return scope["forward"]


MLP = """
def forward(self, x):
    return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))
"""


class TestChanged:
    @pytest.mark.parametrize("kind", ["causal", "conditional"])
    def test_another_forward_is_skipped_with_the_reason_and_the_rest_is_patched(
        self, monkeypatch, kind
    ):
        monkeypatch.setattr(gemma4.Gemma4TextMLP, "forward", compiled_from_text(MLP, readable=True))
        model, stock = tiny_model(kind), tiny_model(kind)
        report = gemma_accel.apply(model)
        reason = skips(report)["geglu"]
        version = f"transformers {transformers.__version__}"
        assert f"Gemma4TextMLP of {version} is not the source" in reason
        assert TESTED["transformers"] in reason and "newer gemma_accel" in reason
        assert sum(r.patch == "geglu" for r in report.skipped) == 5
        printed = re.sub(r"[^\w.]+", " ", str(report))
        assert "skipped Gemma4TextMLP of transformers" in printed
        applied = {record.patch for record in report.applied}
        others = {"rms_norm", "qk_norm_rope", "decoder_layer", "per_layer_embeddings", "attention"}
        assert others <= applied and "geglu" not in applied
        mlps = [m for m in model.modules() if isinstance(m, gemma4.Gemma4TextMLP)]
        assert mlps and not any(isinstance(mlp, Fused) for mlp in mlps)
        assert_alike(model, stock)
        report.restore()
        assert torch.equal(outputs(model)[0], outputs(stock)[0])

    def test_what_needs_a_skipped_patch_is_skipped_too(self, monkeypatch):
        monkeypatch.setattr(gemma4.Gemma4TextMLP, "forward", compiled_from_text(MLP, readable=True))
        report = gemma_accel.apply(tiny_model())
        lora = [r for r in report.skipped if r.patch == "lora"]
        assert len(lora) == 5 and {r.reason for r in lora} == {"it needs the 'geglu' patch here"}
        assert all(r.path.endswith("mlp") for r in lora)

    def test_what_many_patches_stand_in_for_is_skipped_in_all_of_them(self, monkeypatch):
        def forward(self, x):
            return stock_forward(self, x) * 1.25

        stock_forward = gemma4.Gemma4RMSNorm.forward
        monkeypatch.setattr(gemma4.Gemma4RMSNorm, "forward", forward)
        model, stock = media.model(), media.model()
        report = gemma_accel.apply(model)
        reasons = skips(report)
        normed = {name for name, seams in SEAMS.items() if "Gemma4RMSNorm" in seams}
        assert {"rms_norm", "decoder_layer", "vision_layer", "audio_layer"} < normed
        for name in normed & {patch.name for patch in BUILT_IN.values()}:
            assert "Gemma4RMSNorm" in reasons[name] and __name__ in reasons[name], name
        applied = {record.patch for record in report.applied}
        assert {"geglu", "attention", "vision_mlp"} <= applied and not applied & normed
        inputs = media.inputs(images=1, sounds=1)
        with torch.no_grad():
            got, expected = model(**inputs).logits, stock(**inputs).logits
        assert (got - expected).norm() <= 1e-5 * expected.norm()

    def test_a_forward_without_source_cannot_be_told(self, monkeypatch):
        forward = compiled_from_text(MLP, readable=False)
        monkeypatch.setattr(gemma4.Gemma4TextMLP, "forward", forward)
        model, stock = tiny_model(), tiny_model()
        reason = skips(gemma_accel.apply(model))["geglu"]
        assert "has no source that could be read" in reason
        assert "Gemma4TextMLP" in reason and "cannot be told" in reason
        assert_alike(model, stock)

    def test_a_wrapper_of_somebody_elses_is_not_looked_through(self, monkeypatch):
        """functools.wraps leads to the stock source, and the wrapper would be lost."""
        stock_forward = gemma4.Gemma4TextMLP.forward
        calls = []

        @functools.wraps(stock_forward)
        def counted(self, x):
            calls.append(self)
            return stock_forward(self, x)

        monkeypatch.setattr(gemma4.Gemma4TextMLP, "forward", counted)
        model = tiny_model()
        reason = skips(gemma_accel.apply(model))["geglu"]
        assert f"wrapped by {__name__}" in reason
        model(**batch())
        assert len(calls) == 5

    @pytest.mark.parametrize("patch", BUILT_IN)
    def test_any_of_a_patchs_seams_alone_keeps_it_out(self, monkeypatch, patch):
        for name in SEAMS[patch]:
            module = fingerprints._home(name)
            if module in fingerprints._ONLY_WITH:
                importlib.import_module(fingerprints._ONLY_WITH[module])
            with monkeypatch.context() as changed:
                changed.setitem(KNOWN[module], name, ("000000000000",))
                assert name in why_not(patch)
        assert why_not(patch) is None

    def test_something_that_is_gone_is_a_change(self, monkeypatch):
        monkeypatch.delattr(gemma4, "rotate_half")
        assert "rotate_half" in why_not("qk_norm_rope")
        assert why_not("geglu") is None

    def test_every_patch_out_is_the_stock_model(self, monkeypatch):
        for names in KNOWN.values():
            for name in list(names):
                monkeypatch.setitem(names, name, ("000000000000",))
        model, stock = media.model(), media.model()
        report = gemma_accel.apply(model)
        assert report.applied == []
        assert not any(isinstance(module, Fused) for module in model.modules())
        inputs = media.inputs(images=1, sounds=1)
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, stock(**inputs).logits)


class _Guest(Patch):
    name, seam, replaces = "guest_mlp", "_guest", ()

    def matches(self, path, module):
        return type(module) is gemma4.Gemma4TextMLP

    def install(self, module):
        module._guest = True
        return lambda: vars(module).pop("_guest")


class _Plugin:
    @hookimpl
    def gemma_accel_patches(self):
        return [_Guest()]


def test_a_guests_patch_is_not_asked_for_a_fingerprint(monkeypatch):
    """Not even at a seam where the package's own patch stays out."""
    monkeypatch.setattr(gemma4.Gemma4TextMLP, "forward", changed_mlp)
    manager = patching.registry().manager
    plugin = _Plugin()
    manager.register(plugin)
    try:
        report = gemma_accel.apply(tiny_model())
    finally:
        manager.unregister(plugin)
    assert sum(record.patch == "guest_mlp" for record in report.applied) == 5
    assert "geglu" in skips(report)


@pytest.mark.gpu
def test_strict_refuses_a_changed_seam(monkeypatch):
    from gemma_accel.errors import SkippedPatchError

    monkeypatch.setattr(gemma4.Gemma4TextMLP, "forward", changed_mlp)
    with pytest.raises(SkippedPatchError, match="geglu at .*Gemma4TextMLP"):
        gemma_accel.apply(tiny_model().cuda(), strict=True)
