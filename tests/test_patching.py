"""apply(): what it touches, what it refuses, and the way back."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer

import gemma_accel
from gemma_accel import errors, patching
from gemma_accel.hookspecs import Patch, hookimpl
from gemma_accel.patches.seams import Fused
from tests.tiny import batch, tiny_model

pytestmark = pytest.mark.usefixtures("references")


@pytest.fixture(params=["causal", "conditional"])
def model(request):
    return tiny_model(request.param)


@pytest.fixture
def plugins():
    """The process's registry, given back as it was."""
    manager = patching.registry().manager
    before = set(manager.get_plugins())
    yield patching.registry()
    for plugin in set(manager.get_plugins()) - before:
        manager.unregister(plugin)


def logits(model):
    with torch.no_grad():
        return model(**batch()).logits


def state(model):
    """Everything apply may touch: classes and instance attributes of every module."""
    return {
        path: (type(module), {k for k in vars(module) if not k.startswith("_gemma_accel")})
        for path, module in model.named_modules()
    }


class TestApply:
    def test_reports_every_text_patch_and_no_skip_on_a_stock_model(self, model):
        report = gemma_accel.apply(model)
        names = {record.patch for record in report.applied}
        assert {
            "rms_norm",
            "qk_norm_rope",
            "geglu",
            "decoder_layer",
            "per_layer_embeddings",
        } <= names
        layers = {r.path for r in report.applied if r.patch == "decoder_layer"}
        assert len(layers) == 5
        skipped = {r.patch for r in report.skipped if r.modality == "text"}
        assert skipped == (set() if torch.cuda.is_available() else {"cuda_graphs"})
        assert "decoder_layer" in str(report)

    def test_twice_is_the_same_as_once(self, model):
        report = gemma_accel.apply(model)
        before = state(model)
        assert gemma_accel.apply(model) is report
        assert state(model) == before

    def test_a_second_apply_may_give_it_other_memory(self, model):
        report = gemma_accel.apply(model, vram_gib=2.0)
        text = getattr(model.model, "language_model", model.model)
        assert text.memory.budget == 2 << 30
        assert gemma_accel.apply(model, vram_gib=3.0) is report
        assert text.memory.budget == 3 << 30
        assert report.plan(1, 64).vram_gib == 3.0
        gemma_accel.apply(model)
        assert text.memory.budget == 3 << 30

    def test_restore_gives_the_stock_model_back_bitwise(self, model):
        expected, before = logits(model), state(model)
        report = gemma_accel.apply(model)
        assert any(isinstance(m, Fused) for m in model.modules())
        report.restore()
        report.restore()
        assert state(model) == before
        assert torch.equal(logits(model), expected)
        assert patching.report_of(model) is None
        assert gemma_accel.apply(model) is not report

    def test_restore_reaches_the_copies_that_peft_has_made(self, model):
        report = gemma_accel.apply(model)
        wrapped = get_peft_model(
            model, LoraConfig(target_modules=r".*\.q_proj", modules_to_save=["norm", "mlp"])
        )
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "modules_to_save" in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.01)
        stock, expected = [type(m).__name__ for m in model.modules()], logits(wrapped)
        twin = copy.deepcopy(wrapped)
        report.restore()
        assert not any(isinstance(m, Fused) for m in wrapped.modules())
        assert [type(m).__name__ for m in model.modules()] == stock
        torch.testing.assert_close(logits(wrapped), expected, rtol=1e-3, atol=1e-4)
        assert any(isinstance(m, Fused) for m in twin.modules())

    def test_knows_the_model_inside_peft(self, model):
        wrapped = get_peft_model(
            model,
            LoraConfig(target_modules=r".*(language_model|model)\.layers.*\.(q_proj|down_proj)"),
        )
        report = gemma_accel.apply(wrapped)
        assert gemma_accel.apply(wrapped.get_base_model()) is report
        assert patching.report_of(wrapped) is report
        assert "per-layer table" in report.notes

    def test_a_dropped_model_is_collected_and_lets_go_of_the_trainer(self):
        gc.collect()
        init = Trainer.__init__
        model = tiny_model()
        gemma_accel.apply(model)
        alive = weakref.ref(model)
        del model
        gc.collect()
        assert alive() is None
        assert Trainer.__init__ is init

    def test_limits_itself_to_named_patches(self, model):
        report = gemma_accel.apply(model, patches=["rms_norm", "geglu"])
        assert {record.patch for record in report.applied} == {"rms_norm", "geglu"}

    def test_each_patch_works_alone(self):
        expected = logits(tiny_model("conditional"))
        for name in (patch.name for patch in patching.registry().patches()):
            model = tiny_model("conditional")
            gemma_accel.apply(model, patches=[name])
            model.gradient_checkpointing_enable({"use_reentrant": False})
            out = model(**batch())
            out.loss.backward()
            tokens = batch()["attention_mask"].bool()
            assert torch.allclose(out.logits[tokens], expected[tokens], atol=1e-3), name

    def test_unknown_patch_names_those_there_are(self, model):
        with pytest.raises(ValueError, match=r"'geglue'.*There are: .*geglu"):
            gemma_accel.apply(model, patches=["geglue"])

    def test_deepcopy_of_an_applied_model_computes_the_same_and_can_be_applied(self, model):
        gemma_accel.apply(model)
        twin = copy.deepcopy(model)
        assert torch.equal(logits(twin), logits(model))
        with torch.no_grad():
            next(twin.parameters()).add_(1.0)
        assert not torch.equal(next(twin.parameters()), next(model.parameters()))
        assert patching.report_of(twin) is None
        report = gemma_accel.apply(twin)
        report.restore()
        assert not any(isinstance(m, Fused) for m in twin.modules())
        assert any(isinstance(m, Fused) for m in model.modules())

    def test_pickles_as_the_stock_classes(self, model):
        expected = logits(model)
        gemma_accel.apply(model)
        twin = pickle.loads(pickle.dumps(model))
        assert not any(isinstance(m, Fused) for m in twin.modules())
        assert torch.equal(logits(twin), expected)

    def test_state_dict_keys_and_class_names_stay_stock(self, model):
        keys, names = list(model.state_dict()), [type(m).__name__ for m in model.modules()]
        gemma_accel.apply(model)
        assert list(model.state_dict()) == keys
        assert [type(m).__name__ for m in model.modules()] == names

    def test_double_precision_is_left_stock_with_the_reason(self):
        report = gemma_accel.apply(tiny_model(dtype=torch.float64))
        assert not [r for r in report.applied if r.patch == "rms_norm" and "v_norm" not in r.path]
        assert any("float64" in record.reason for record in report.skipped)

    def test_other_activation_is_left_stock_with_the_reason(self):
        report = gemma_accel.apply(tiny_model(hidden_activation="silu"))
        skipped = {r.patch: r.reason for r in report.skipped}
        assert "SiLUActivation" in skipped["geglu"] and "SiLU" in skipped["decoder_layer"]


class TestRefusals:
    def test_not_gemma_4(self):
        with pytest.raises(errors.UnsupportedModelError, match="got Linear") as caught:
            gemma_accel.apply(torch.nn.Linear(2, 2))
        assert isinstance(caught.value, TypeError)

    def test_compiled(self, model):
        with pytest.raises(errors.UnsupportedModelError, match="Apply it to the model before"):
            gemma_accel.apply(torch.compile(model, backend="eager"))
        report = gemma_accel.apply(model)
        assert gemma_accel.apply(torch.compile(model, backend="eager")) is report

    def test_offloaded_by_accelerate(self, model):
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        add_hook_to_module(model.model, AlignDevicesHook())
        before = state(model)
        with pytest.raises(errors.ForeignPatchError, match=r"'model'.*device_map"):
            gemma_accel.apply(model)
        assert state(model) == before

    def test_liger(self, model):
        norm = next(m for m in model.modules() if type(m).__name__ == "Gemma4RMSNorm")

        def forward(x):
            return x

        forward.__module__ = "liger_kernel.transformers.rms_norm"
        norm.forward = forward
        before = state(model)
        with pytest.raises(errors.ForeignPatchError, match="liger_kernel already patched"):
            gemma_accel.apply(model)
        assert state(model) == before

    def test_anothers_forward_is_left_alone(self, model):
        mlp = next(m for m in model.modules() if type(m).__name__ == "Gemma4TextMLP")
        mlp.forward = lambda x: x
        report = gemma_accel.apply(model)
        (skip,) = [r for r in report.skipped if r.patch == "geglu"]
        assert "another library bound its own forward" in skip.reason

    def test_restore_refuses_where_somebody_wrapped_since(self, model):
        report = gemma_accel.apply(model)
        path, mlp = next(
            (p, m) for p, m in model.named_modules() if type(m).__name__ == "Gemma4TextMLP"
        )
        mlp.forward = mlp.forward
        before = state(model)
        with pytest.raises(errors.RestoreError, match=path):
            report.restore()
        assert state(model) == before
        del mlp.forward
        report.restore()

    def test_a_budget_that_nothing_fits_says_what_would(self, model):
        before = state(model)
        with pytest.raises(errors.BudgetError, match=r"Give at least"):
            gemma_accel.apply(model, vram_gib=1e-6)
        assert state(model) == before
        for wrong in (-1, float("inf"), float("nan"), "7", True):
            with pytest.raises(ValueError, match="vram_gib must be a positive, finite"):
                gemma_accel.apply(model, vram_gib=wrong)
        assert state(model) == before


class _Marker(Patch):
    """A guest's patch: sets an attribute on one kind of module."""

    def __init__(self, name="guest", seam="_guest", fails=False, replaces=()):
        self.name, self.seam, self.fails, self.replaces = name, seam, fails, replaces

    def matches(self, path, module):
        return type(module).__name__ == "Gemma4TextMLP"

    def install(self, module):
        if self.fails and module.down_proj.in_features > 128:
            raise RuntimeError("no")
        module._guest = True
        return lambda: vars(module).pop("_guest")


class _Plugin:
    def __init__(self, *patches, select=None, applied=None):
        self.patches, self.select, self.seen = patches, select, applied

    @hookimpl
    def gemma_accel_patches(self):
        return self.patches

    @hookimpl
    def gemma_accel_select(self, patch, path, module):
        return self.select(patch, path) if self.select else None

    @hookimpl
    def gemma_accel_applied(self, model, report):
        if self.seen:
            self.seen(model, report)


class TestPlugins:
    def test_a_guest_patch_is_installed_and_undone_like_a_built_in_one(self, model, plugins):
        plugins.register(_Plugin(_Marker()))
        report = gemma_accel.apply(model)
        assert sum(r.patch == "guest" for r in report.applied) == 5
        report.restore()
        assert not any("_guest" in vars(m) for m in model.modules())

    def test_deselects_modules(self, model, plugins):
        plugins.register(
            _Plugin(select=lambda patch, path: False if patch.name == "geglu" else None)
        )
        report = gemma_accel.apply(model)
        assert not [r for r in report.applied if r.patch == "geglu"]
        assert {r.reason for r in report.skipped if r.patch == "geglu"} == {
            "a plugin deselected it"
        }

    def test_replaces_a_built_in_patch(self, model, plugins):
        plugins.register(_Plugin(_Marker(seam="class", replaces=("geglu",))))
        names = {r.patch for r in gemma_accel.apply(model).applied}
        assert "guest" in names and "geglu" not in names

    def test_two_patches_for_one_seam_name_both(self, model, plugins):
        plugins.register(_Plugin(_Marker(seam="class")))
        before = state(model)
        with pytest.raises(errors.PatchConflictError, match=r"'geglu' and 'guest'"):
            gemma_accel.apply(model)
        assert state(model) == before

    def test_two_patches_of_one_name(self, model, plugins):
        plugins.register(_Plugin(_Marker("geglu")), name="clumsy")
        with pytest.raises(errors.PatchConflictError, match="'clumsy'"):
            gemma_accel.apply(model)

    @pytest.mark.parametrize("hook", ["select", "applied"])
    def test_a_hook_that_raises_is_named_and_leaves_the_model_stock(self, model, plugins, hook):
        def fail(*_):
            raise KeyError("oops")

        plugins.register(_Plugin(**{hook: fail}), name="faulty")
        before = state(model)
        with pytest.raises(
            errors.PluginError, match=rf"'faulty' raised in gemma_accel_{hook}.*oops"
        ):
            gemma_accel.apply(model)
        assert state(model) == before
        assert patching.report_of(model) is None

    def test_a_patch_that_fails_half_way_takes_everything_back(self, model, plugins):
        plugins.register(_Plugin(_Marker(fails=True)))
        before = state(model)
        with pytest.raises(errors.PatchError, match="'guest' failed at .*RuntimeError: no"):
            gemma_accel.apply(model)
        assert state(model) == before

    def test_applied_is_told_the_model_and_the_report(self, model, plugins):
        seen = []
        plugins.register(_Plugin(applied=lambda m, r: seen.append((m, r))))
        report = gemma_accel.apply(model)
        assert seen == [(model, report)]

    def test_a_misspelt_hook_is_an_error(self):
        class Misspelt:
            @hookimpl
            def gemma_accel_patchs(self):
                return []

        from gemma_accel.registry import Registry

        with pytest.raises(errors.PluginError, match="gemma_accel_patchs"):
            Registry({"misspelt": Misspelt()}, entry_points=False)

    def test_what_is_no_patch_is_refused(self, model, plugins):
        plugins.register(_Plugin("geglu"), name="wrong")
        with pytest.raises(errors.PluginError, match="'wrong'.*gemma_accel.Patch"):
            gemma_accel.apply(model)
