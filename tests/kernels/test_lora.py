from __future__ import annotations

import copy
import math

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from gemma_accel.kernels import lora as module
from gemma_accel.kernels.lora import (
    Gradients,
    Needs,
    Projection,
    project,
    project_backward,
    project_forward,
    project_ref,
)
from gemma_accel.kernels.nf4 import NF4Weight, nf4_dequantize_ref, nf4_weight
from tests.accuracy import assert_no_less_accurate, assert_same_but_for_rounding

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
K = 128
NAMES = "abc"
# output features and, where adapted, rank and alpha of each projection
GROUPS = {
    "one": [(64, 8, 16)],
    "plain": [(64, None, None)],
    "two": [(192, 4, 16), (64, None, None)],
    "three": [(192, 8, 16), (64, 8, 16), (64, 8, 16)],
    "uneven": [(128, 8, 16), (64, 4, 16), (192, 16, 8)],
}


class Group(nn.Module):
    """Layers that share an input, as stock calls them."""

    def __init__(self, group, dtype, *, quantised, bias, device):
        super().__init__()
        for name, (n, _, _) in zip(NAMES, group, strict=False):
            if quantised:
                layer = Linear4bit(K, n, bias=bias, quant_type="nf4", compute_dtype=dtype)
            else:
                layer = nn.Linear(K, n, bias=bias)
            setattr(self, name, layer.to(dtype))
        self.is_loaded_in_4bit = quantised
        self.to(device)

    def forward(self, x):
        return tuple(getattr(self, name)(x) for name in NAMES if hasattr(self, name))


def build(
    group,
    dtype,
    *,
    quantised=False,
    bias=False,
    rslora=False,
    float32_adapters=False,
    device="cpu",
):
    """Real PEFT layers, the products of their adapters about half as large as those of the base.

    In train mode: in eval bitsandbytes repacks weights on some CPUs.
    """
    model = Group(group, dtype, quantised=quantised, bias=bias, device=device)
    adapted = {n: (r, a) for n, (_, r, a) in zip(NAMES, group, strict=False) if r}
    if adapted:
        config = LoraConfig(
            target_modules=list(adapted),
            rank_pattern={n: r for n, (r, _) in adapted.items()},
            alpha_pattern={n: a for n, (_, a) in adapted.items()},
            use_rslora=rslora,
        )
        model = get_peft_model(model, config, autocast_adapter_dtype=float32_adapters)
        model = model.base_model.model
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            if not float32_adapters:
                parameter.data = parameter.data.to(dtype)
            size = 1.0 if "lora_A" in name else 0.15
            nn.init.normal_(parameter, std=size / math.sqrt(parameter.shape[1]))
    return model.train()


def projection_of(layer) -> Projection:
    """What a patch reads of a layer at call time."""
    base, a, b, scaling = layer, None, None, 1.0
    if isinstance(layer, LoraLayer):
        base, scaling = layer.get_base_layer(), layer.scaling["default"]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight = base.weight
    if isinstance(base, Linear4bit):
        weight = nf4_weight(weight)
    return Projection(weight, base.bias, a, b, scaling)


def projections_of(model) -> list[Projection]:
    return [projection_of(getattr(model, name)) for name in NAMES if hasattr(model, name)]


def in_float64(p: Projection) -> Projection:
    weight = p.weight
    if isinstance(weight, NF4Weight):
        weight = nf4_dequantize_ref(weight, dtype=torch.float32)
    tensors = [weight, *p[1:4]]
    copies = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    return p._replace(weight=copies[0], bias=copies[1], lora_a=copies[2], lora_b=copies[3])


def parameters_of(projections) -> dict[str, torch.Tensor]:
    return {
        f"{name} of {i}": t
        for i, p in enumerate(projections)
        for name, t in zip(Gradients._fields, p[:4], strict=True)
        if isinstance(t, torch.Tensor)
    }


def run(function, x, projections, dys):
    """Outputs and every gradient of ``function(x)``, by name."""
    x = x.detach().requires_grad_()
    leaves = {"x": x, **parameters_of(projections)}
    outs = function(x)
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    loss = [(y * dy.to(y.dtype)).sum() for y, dy in zip(outs, dys, strict=True)]
    grads = torch.autograd.grad(loss, list(wanted.values()))
    results = {f"y{i}": y.detach() for i, y in enumerate(outs)}
    return results | {f"d {n}": g for n, g in zip(wanted, grads, strict=True)}


def check(model, x, *, dtype=None):
    """Ours on the parameters of ``model`` against the stock layers, both against float64."""
    projections = projections_of(model)
    dys = [torch.randn(*x.shape[:-1], p.weight.shape[0], device=x.device) for p in projections]
    dys = [dy.to(dtype or x.dtype) for dy in dys]
    exact = [in_float64(p) for p in projections]
    truth = run(lambda x: project_ref(x, *exact), x.double(), exact, dys)
    stock = run(model, x, projections, dys)
    ours = run(lambda x: project(x, *projections), x, projections, dys)
    assert ours.keys() == stock.keys() and len(ours) > len(projections)
    for name in ours:
        reduced = K if name.startswith("y") else 512
        assert_no_less_accurate(ours[name], stock[name], truth[name], what=name, reduced=reduced)
    return ours


def make(shape, dtype, device):
    return (torch.randn(shape, device=device) * (1 + torch.arange(K, device=device) % 5)).to(dtype)


def freeze_base(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_as_accurate_as_peft(name, dtype, quantised, device, poisoned):
    model = build(GROUPS[name], dtype, quantised=quantised, device=device)
    freeze_base(model)
    ours = check(model, make((2, 9, K), dtype, device))
    assert all(t.dtype == dtype for t in ours.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_full_fine_tuning_with_bias(name, dtype, device, poisoned):
    model = build(GROUPS[name], dtype, bias=True, device=device)
    model.requires_grad_(True)
    ours = check(model, make((3, 5, K), dtype, device))
    assert "d weight of 0" in ours and "d bias of 0" in ours


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
def test_rslora_scaling(quantised, device):
    model = build(GROUPS["uneven"], torch.float32, quantised=quantised, rslora=True, device=device)
    scalings = [p.scaling for p in projections_of(model)]
    assert scalings == [16 / math.sqrt(8), 16 / math.sqrt(4), 8 / math.sqrt(16)]
    freeze_base(model)
    check(model, make((2, 7, K), torch.float32, device))


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("name", ["one", "two", "uneven"])
def test_float32_adapters_on_a_bfloat16_base(name, quantised, device, poisoned):
    model = build(
        GROUPS[name], torch.bfloat16, quantised=quantised, float32_adapters=True, device=device
    )
    freeze_base(model)
    ours = check(model, make((2, 9, K), torch.bfloat16, device))
    assert ours["y0"].dtype == torch.bfloat16 and ours["d x"].dtype == torch.bfloat16
    assert ours["d lora_a of 0"].dtype == torch.float32


def test_bfloat16_adapters_on_a_float32_base(device):
    model = build(GROUPS["two"], torch.float32, device=device)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    freeze_base(model)
    ours = check(model, make((2, 9, K), torch.float32, device))
    assert ours["y0"].dtype == torch.float32 and ours["d lora_b of 0"].dtype == torch.bfloat16


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["one", "two", "uneven"])
def test_autocast(name, base, backward_inside, device, poisoned):
    """float32 parameters, or float32 adapters on a bfloat16 base, as Trainer's bf16=True runs."""
    model = build(GROUPS[name], base, bias=True, float32_adapters=True, device=device)
    model.requires_grad_(True)
    x = make((2, 9, K), base, device)

    def autocast(function):
        def inside(x):
            with torch.autocast(device, torch.bfloat16):
                return function(x)

        return inside

    projections = projections_of(model)
    dys = [torch.randn(2, 9, p.weight.shape[0], device=device).bfloat16() for p in projections]
    exact = [in_float64(p) for p in projections]
    truth = run(lambda x: project_ref(x, *exact), x.double(), exact, dys)
    stock = run(autocast(model), x, projections, dys)
    with torch.autocast(device, torch.bfloat16, enabled=backward_inside):
        ours = run(autocast(lambda x: project(x, *projections)), x, projections, dys)
    assert ours["y0"].dtype == torch.bfloat16 and ours["d x"].dtype == base
    for name in ours:
        assert_no_less_accurate(ours[name], stock[name], truth[name], what=name, reduced=512)


def test_autocast_on_nf4(device):
    model = build(
        GROUPS["two"], torch.bfloat16, quantised=True, float32_adapters=True, device=device
    )
    freeze_base(model)
    with torch.autocast(device, torch.bfloat16):
        check(model, make((2, 9, K), torch.bfloat16, device))


def test_backward_ignores_an_autocast_around_it(device):
    model = build(GROUPS["three"], torch.float32, device=device)
    freeze_base(model)
    projections = projections_of(model)
    x = make((2, 9, K), torch.float32, device).requires_grad_()
    grads = []
    for enabled in (False, True):
        loss = sum(y.sum() for y in project(x, *projections))
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(loss, [x, projections[1].lora_a]))
            assert torch.is_autocast_enabled(device) is enabled
    for without, within in zip(*grads, strict=True):
        assert torch.equal(without, within)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float32_input_on_a_weight_quantised_from_bfloat16(dtype, device):
    """bitsandbytes decodes to the dtype it computes in; ours does so in backward as well."""
    model = build(GROUPS["two"], dtype, quantised=True, device=device)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    for name in NAMES[:2]:
        layer = getattr(model, name)
        base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
        base.compute_dtype = torch.float32
        assert base.weight.quant_state.dtype == dtype
    freeze_base(model)
    check(model, make((2, 9, K), torch.float32, device))


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("shape", [(K,), (1, K), (0, K), (1, 1, K), (37, K)], ids=str)
def test_few_and_odd_rows(shape, quantised, device):
    model = build(GROUPS["uneven"], torch.float32, quantised=quantised, device=device)
    freeze_base(model)
    projections = projections_of(model)
    x = make(shape, torch.float32, device)
    dys = [torch.randn(*shape[:-1], p.weight.shape[0], device=device) for p in projections]
    exact = [in_float64(p) for p in projections]
    truth = run(lambda x: project_ref(x, *exact), x.double(), exact, dys)
    ours = run(lambda x: project(x, *projections), x, projections, dys)
    for name, t in ours.items():
        torch.testing.assert_close(t.double(), truth[name], rtol=1e-4, atol=1e-3, msg=name)


def test_input_and_gradients_that_are_not_contiguous(device):
    model = build(GROUPS["uneven"], torch.float32, device=device)
    freeze_base(model)
    projections = projections_of(model)
    x = make((4, 6, K), torch.float32, device)
    wide = make((6, 4, K), torch.float32, device)
    for view in (x[:, ::2], wide.transpose(0, 1), x[..., :1].expand(4, 6, K)):
        assert not view.is_contiguous()
        # as the gradient of .mean(): one number, expanded
        dys = [view.new_ones(()).expand(*view.shape[:-1], p.weight.shape[0]) for p in projections]
        for_view = run(lambda x: project(x, *projections), view, projections, dys)
        straight = run(lambda x: project(x, *projections), view.contiguous(), projections, dys)
        for name, t in for_view.items():
            torch.testing.assert_close(t, straight[name], msg=name)


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
def test_rows(quantised, device, poisoned):
    """Slices of one wide projection, as the layers take theirs of the per-layer projection."""
    model = build([(192, 8, 16)], torch.float32, quantised=quantised, bias=True, device=device)
    if quantised:
        freeze_base(model)
    else:
        model.requires_grad_(True)
    (whole,) = projections_of(model)
    x = make((2, 9, K), torch.float32, device)
    parts = [(0, 64), (64, 65), (65, 192)]
    dys = [torch.randn(2, 9, stop - start, device=device) for start, stop in parts]
    stock = run(
        lambda x: tuple(model.a(x)[..., start:stop] for start, stop in parts), x, [whole], dys
    )
    exact = in_float64(whole)
    truth = run(
        lambda x: project_ref(x, *(exact._replace(rows=rows) for rows in parts)),
        x.double(),
        [exact],
        dys,
    )
    for together in (True, False):

        def ours(x, together=together):
            slices = [whole._replace(rows=rows) for rows in parts]
            return project(x, *slices) if together else [project(x, p)[0] for p in slices]

        results = run(ours, x, [whole], dys)
        assert results.keys() == stock.keys()
        for name, t in results.items():
            assert_no_less_accurate(t, stock[name], truth[name], what=name, reduced=512)


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
def test_each_gradient_alone(quantised, device, poisoned):
    model = build(
        GROUPS["uneven"], torch.float32, quantised=quantised, bias=not quantised, device=device
    )
    model.requires_grad_(not quantised)
    freeze_base(model) if quantised else None
    projections = projections_of(model)
    x = make((2, 9, K), torch.float32, device)
    dys = [torch.randn(2, 9, p.weight.shape[0], device=device) for p in projections]
    together = run(lambda x: project(x, *projections), x, projections, dys)
    leaves = {"x": x, **parameters_of(projections)}
    trainable = [name for name, t in leaves.items() if t.requires_grad or name == "x"]
    assert len(trainable) == (7 if quantised else 13)
    for alone in trainable:
        for name, t in leaves.items():
            t.requires_grad_(name == alone)
        outs = project(x, *projections)
        loss = [(y * dy).sum() for y, dy in zip(outs, dys, strict=True) if y.requires_grad]
        assert len(loss) == (3 if alone == "x" else 1)  # what is frozen is no part of the graph
        (grad,) = torch.autograd.grad(loss, [leaves[alone]])
        torch.testing.assert_close(grad, together[f"d {alone}"], rtol=1e-5, atol=1e-4, msg=alone)
        needs = Needs(
            alone == "x",
            [Gradients(*(alone == f"{n} of {i}" for n in Gradients._fields)) for i in range(3)],
        )
        rows = x.detach().view(-1, K)
        with torch.no_grad():
            _, xa = project_forward(rows, projections)
            dx, grads = project_backward(
                rows, xa, [dy.view(18, -1) for dy in dys], projections, needs
            )
        computed = [t for t in (dx, *(t for g in grads for t in g)) if t is not None]
        assert len(computed) == 1 and computed[0].numel() == grad.numel()


def test_outputs_that_no_gradient_reaches(device):
    model = build(GROUPS["uneven"], torch.float32, device=device)
    freeze_base(model)
    projections = projections_of(model)
    x = make((2, 9, K), torch.float32, device).requires_grad_()
    dy = torch.randn(2, 9, 64, device=device)
    used = [projections[1].lora_a, projections[1].lora_b, x]
    ours = torch.autograd.grad((project(x, *projections)[1] * dy).sum(), used)
    alone = torch.autograd.grad((project(x, projections[1])[0] * dy).sum(), used)
    for a, b in zip(ours, alone, strict=True):
        torch.testing.assert_close(a, b)
    loss = (project(x, *projections)[1] * dy).sum()
    (unused,) = torch.autograd.grad(loss, [projections[0].lora_a], allow_unused=True)
    assert unused is None


def saved_by(function):
    """Storages that autograd keeps, through the hooks an offloader would use."""
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return saved


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("name", ["one", "three", "uneven"])
def test_keeps_the_input_once_and_no_weight(name, quantised, device):
    model = build(GROUPS[name], torch.bfloat16, quantised=quantised, device=device)
    freeze_base(model)
    projections = projections_of(model)
    x = make((2, 9, K), torch.bfloat16, device).requires_grad_()
    saved = saved_by(lambda: project(x, *projections))
    ranks = sum(r for _, r, _ in GROUPS[name])
    assert [tuple(t.shape) for t in saved] == [(2, 9, K), (18, ranks)]
    assert saved[0].data_ptr() == x.data_ptr()
    assert len(saved_by(lambda: model(x))) > 2 * len(projections)  # the hooks do see stock's


def test_keeps_only_what_a_gradient_reads(device):
    model = build(GROUPS["two"], torch.float32, device=device)
    projections = projections_of(model)
    x = make((2, 9, K), torch.float32, device).requires_grad_()
    model.requires_grad_(False)
    assert saved_by(lambda: project(x, *projections)) == []
    projections[0].lora_b.requires_grad_(True)
    assert [tuple(t.shape) for t in saved_by(lambda: project(x, *projections))] == [(18, 4)]
    x.requires_grad_(False)
    projections[0].lora_b.requires_grad_(False)
    assert not any(y.requires_grad for y in project(x, *projections))


def test_autocast_keeps_the_input_as_it_was_used(device):
    model = build(GROUPS["two"], torch.float32, device=device)
    freeze_base(model)
    x = make((2, 9, K), torch.float32, device).requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        saved = saved_by(lambda: project(x, *projections_of(model)))
    assert [t.dtype for t in saved] == [torch.bfloat16, torch.bfloat16]


class Launches(TorchDispatchMode):
    """Counts what would be a kernel on a card: every operation that is no view or allocation."""

    FREE = {"view", "t", "transpose", "slice", "split", "detach", "alias", "select", "expand"}
    FREE |= {"empty", "empty_like", "_unsafe_view", "as_strided", "new_empty", "unsqueeze"}
    FREE |= {"split_with_sizes"}

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def launches(function, x, parameters):
    with Launches() as forward:
        outs = function(x)
    dys = [torch.ones_like(y) for y in outs]
    with Launches() as backward:
        torch.autograd.grad(outs, [x, *parameters], dys)
    return forward.names, backward.names


@pytest.mark.parametrize("count", [1, 2, 3])
def test_launches_are_those_of_the_docstring(count, device, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        module,
        "nf4_dequantize",
        lambda w, *, out=None, **kwargs: (
            decoded.append(w) or (torch.empty(w.shape) if out is None else out)
        ),
    )
    stack = count > 1
    for quantised in (True, False):
        decoded.clear()
        model = build([(64, 8, 16)] * count, torch.float32, quantised=quantised)
        freeze_base(model)
        projections = projections_of(model)
        parameters = [t for p in projections for t in (p.lora_a, p.lora_b)]
        x = make((18, K), torch.float32, "cpu").requires_grad_()
        forward, backward = launches(lambda x, p=projections: project(x, *p), x, parameters)
        decodes = len(decoded) / 2
        assert decodes == (count if quantised else 0)
        assert len(forward) + decodes == (2 + quantised) * count + 1 + stack, forward
        assert len(backward) + decodes == (3 + quantised) * count + 2 + stack, backward
        assert set(forward + backward) <= {"mm", "addmm", "addmm_", "cat"}
    forward, backward = launches(model, x, parameters)  # stock, dense
    assert len(forward) == 5 * count and len(backward) == 8 * count - 1, (forward, backward)


def test_under_autocast_the_adapters_of_a_group_are_cast_together(device):
    model = build(GROUPS["three"], torch.bfloat16, float32_adapters=True, device=device)
    freeze_base(model)
    x = make((18, K), torch.bfloat16, device)
    with torch.autocast(device, torch.bfloat16), Launches() as forward, torch.no_grad():
        project(x, *projections_of(model))
    casts = [n for n in forward.names if n not in {"mm", "addmm_"}]
    assert casts == ["_foreach_copy_"]


def test_one_buffer_serves_the_weights_of_a_group(device, monkeypatch):
    buffers = []
    decode = module.nf4_dequantize

    def recorded(w, *, out=None, **kwargs):
        dense = decode(w, out=out, **kwargs)
        buffers.append(dense.untyped_storage().data_ptr())
        return dense

    monkeypatch.setattr(module, "nf4_dequantize", recorded)
    model = build(GROUPS["uneven"], torch.float32, quantised=True, device=device)
    freeze_base(model)
    x = make((2, 9, K), torch.float32, device).requires_grad_()
    outs = project(x, *projections_of(model))
    assert len(buffers) == 3 and len(set(buffers)) == 1
    buffers.clear()
    sum(y.sum() for y in outs).backward()
    assert len(buffers) == 3 and len(set(buffers)) == 1


def test_accumulates_into_gradients_as_stock(device):
    """Two micro-batches: the gradients of a group's adapters share no memory that matters."""
    model = build(GROUPS["three"], torch.float32, device=device)
    freeze_base(model)
    other = copy.deepcopy(model)
    for _ in range(2):
        x = make((2, 9, K), torch.float32, device)
        sum(y.square().sum() for y in project(x, *projections_of(model))).backward()
        sum(y.square().sum() for y in other(x)).backward()
    mine = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(mine[name].grad, parameter.grad, rtol=1e-4, atol=1e-2)


def test_repeat_run_is_bitwise_equal(device):
    model = build(GROUPS["uneven"], torch.bfloat16, quantised=True, device=device)
    freeze_base(model)
    projections = projections_of(model)
    x = make((2, 9, K), torch.bfloat16, device)
    dys = [torch.randn(2, 9, p.weight.shape[0], device=device) for p in projections]
    runs = [run(lambda x: project(x, *projections), x, projections, dys) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_an_untrained_adapter_changes_nothing(device):
    """lora_B is zero at first: outputs are those of the base, bit for bit."""
    model = build(GROUPS["three"], torch.bfloat16, device=device)
    projections = projections_of(model)
    for p in projections:
        nn.init.zeros_(p.lora_b)
    x = make((2, 9, K), torch.bfloat16, device)
    adapted = project(x, *projections)
    plain = project(x, *(Projection(p.weight) for p in projections))
    for a, b in zip(adapted, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
def test_without_gradients_the_same_outputs(quantised, device):
    model = build(GROUPS["uneven"], torch.float32, quantised=quantised, device=device)
    x = make((2, 9, K), torch.float32, device)
    with torch.no_grad():
        plain = project(x, *projections_of(model))
    for a, b in zip(plain, project(x, *projections_of(model)), strict=True):
        assert torch.equal(a, b) and not a.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_plain_functions_serve_a_memory_policy(dtype, device, poisoned):
    """Tiles of tokens: dx into a slice of one buffer, xa computed again, gradients summed."""
    model = build(GROUPS["uneven"], dtype, quantised=True, device=device)
    freeze_base(model)
    projections = projections_of(model)
    x = make((20, K), dtype, device)
    dys = [torch.randn(20, p.weight.shape[0], device=device).to(dtype) for p in projections]
    whole = run(lambda x: project(x, *projections), x, projections, dys)
    needs = Needs(True, [Gradients(False, False, True, True)] * 3)
    dx = torch.full_like(x, float("nan"))
    sums = [torch.zeros_like(p.lora_a, dtype=torch.float32) for p in projections]
    with torch.no_grad():
        for rows in (slice(0, 12), slice(12, 20)):
            outs, _ = project_forward(x[rows], projections)
            for i, y in enumerate(outs):
                torch.testing.assert_close(y, whole[f"y{i}"][rows])
            tile, grads = project_backward(
                x[rows], None, [dy[rows] for dy in dys], projections, needs, out=dx[rows]
            )
            assert tile.data_ptr() == dx[rows].data_ptr()
            for total, g in zip(sums, grads, strict=True):
                assert g.weight is None and g.bias is None
                total += g.lora_a
    assert_same_but_for_rounding(dx, whole["d x"], what="d x")
    for i, total in enumerate(sums):
        assert_same_but_for_rounding(
            total.to(dtype), whole[f"d lora_a of {i}"], what=f"d lora_a of {i}"
        )


def test_gradcheck_of_reference_and_of_ours():
    shapes = [(6, 5), (6,), (2, 5), (6, 2), (4, 5), (3, 5), (4, 3)]
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(2, 3, 5), *shapes]]

    def call(function):
        def inner(x, w, bias, a, b, w2, a2, b2):
            first = Projection(w, bias, a, b, 0.5, (1, 5))
            return function(x, first, Projection(w2, None, a2, b2, 2.0), Projection(w2))

        return inner

    def call_by_columns(function):
        def inner(x, w, bias, a, b, w2, a2, b2):
            first = Projection(w, bias, a, b, 0.5, (1, 5), (2, 4))
            second = Projection(w2, None, a2, b2, 2.0, columns=(0, 2))
            return function(x[..., :2], first, second)

        return inner

    assert gradcheck(call_by_columns(project_ref), leaves)
    assert gradcheck(call_by_columns(project), leaves)

    assert gradcheck(call(project_ref), leaves)
    assert gradcheck(call(project), leaves)


def test_says_what_is_wrong(device):
    model = build(GROUPS["two"], torch.float32, bias=True, device=device)
    good, plain = projections_of(model)
    x = make((2, 9, K), torch.float32, device)
    wrong = [
        (ValueError, "one of lora_a and lora_b", good._replace(lora_b=None)),
        (ValueError, "rows of projection 0", good._replace(rows=(0, 193))),
        (ValueError, "rows of projection 0", good._replace(rows=(5, 5))),
        (ValueError, "columns of projection 0", good._replace(columns=(0, K + 1))),
        (ValueError, "takes 8 columns", good._replace(columns=(0, 8))),
        (ValueError, "takes 64 columns", Projection(torch.ones(8, 64, device=device))),
        (ValueError, "bias of projection 0", good._replace(bias=plain.bias)),
        (ValueError, "adapters of projection 0", good._replace(lora_b=good.lora_b[:9])),
        (TypeError, "must be in x's dtype", Projection(good.weight.bfloat16())),
        (TypeError, "share a dtype", good._replace(lora_a=good.lora_a.half())),
    ]
    for error, text, projection in wrong:
        for enabled in (True, False):
            with pytest.raises(error, match=text), torch.set_grad_enabled(enabled):
                project(x, projection, plain)


def test_refuses_parameters_written_to_since_forward(device):
    model = build(GROUPS["one"], torch.float32, device=device)
    freeze_base(model)
    projections = projections_of(model)
    (y,) = project(make((2, 9, K), torch.float32, device), *projections)
    with torch.no_grad():
        projections[0].lora_b.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        y.sum().backward()


def test_gradients_of_gradients_are_refused(device):
    model = build(GROUPS["one"], torch.float32, device=device)
    x = make((2, 9, K), torch.float32, device).requires_grad_()
    (y,) = project(x, *projections_of(model))
    (dx,) = torch.autograd.grad(y.square().sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_works_under_checkpointing(device):
    model = build(GROUPS["three"], torch.float32, quantised=True, device=device)
    freeze_base(model)
    projections = projections_of(model)
    x = make((2, 9, K), torch.float32, device)
    dys = [torch.randn(2, 9, p.weight.shape[0], device=device) for p in projections]
    plain = run(lambda x: project(x, *projections), x, projections, dys)
    for reentrant in (False, True):
        checkpointed = run_with_backward(
            lambda x, r=reentrant: torch.utils.checkpoint.checkpoint(
                lambda x: project(x, *projections), x, use_reentrant=r
            ),
            x,
            projections,
            dys,
        )
        for name, t in checkpointed.items():
            assert torch.equal(t, plain[name]), name


def run_with_backward(function, x, projections, dys):
    """``run`` through ``backward()``, which reentrant checkpointing insists on."""
    x = x.detach().requires_grad_()
    leaves = {"x": x, **parameters_of(projections)}
    for t in leaves.values():
        t.grad = None
    sum((y * dy).sum() for y, dy in zip(function(x), dys, strict=True)).backward()
    return {f"d {name}": t.grad for name, t in leaves.items() if t.requires_grad}
