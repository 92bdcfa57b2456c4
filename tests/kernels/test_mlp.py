"""gated_mlp: the same numbers whatever it keeps, and only that."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from gemma_accel.kernels.lora import Projection
from gemma_accel.kernels.mlp import gated_mlp
from tests.accuracy import assert_no_less_accurate

D, WIDTH, R = 24, 40, 4
KEEPS = list(itertools.product([True, False], [None, 6]))
NAMES = ["x", "gate.a", "gate.b", "up.a", "up.b", "down.a", "down.b"]


def inputs(dtype, device, tokens=13, trained=False):
    g = torch.Generator().manual_seed(0)

    def make(*shape, scale=1.0, grad=True):
        return (torch.randn(shape, generator=g) * scale).to(device, dtype).requires_grad_(grad)

    x = make(2, tokens, D)
    weights = [
        make(WIDTH, D, scale=0.2, grad=trained),
        make(WIDTH, D, scale=0.2, grad=trained),
        make(D, WIDTH, scale=0.2, grad=trained),
    ]
    adapters = [(make(R, w.shape[1], scale=0.2), make(w.shape[0], R, scale=0.2)) for w in weights]
    dy = make(2, tokens, D, grad=False)
    return x, weights, adapters, dy


def leaves(x, weights, adapters, trained=False):
    return [x, *(t for pair in adapters for t in pair), *(weights if trained else ())]


def stock(x, weights, adapters):
    def linear(x, w, pair):
        return F.linear(x, w) + F.linear(F.linear(x, pair[0]), pair[1]) * 0.5

    gate, up = (linear(x, w, a) for w, a in zip(weights[:2], adapters[:2], strict=True))
    return linear(F.gelu(gate, approximate="tanh") * up, weights[2], adapters[2])


def ours(x, weights, adapters, **how):
    projections = [
        Projection(w, None, a, b, 0.5) for w, (a, b) in zip(weights, adapters, strict=True)
    ]
    return gated_mlp(x, *projections, **how)


def run(fn, x, weights, adapters, dy, trained=False):
    y = fn(x, weights, adapters)
    return [y, *torch.autograd.grad(y, leaves(x, weights, adapters, trained), dy)]


def widened(made, dtype):
    x, weights, adapters, dy = made

    def wide(t):
        return t.detach().to(dtype).requires_grad_(t.requires_grad)

    return (
        wide(x),
        [wide(w) for w in weights],
        [tuple(map(wide, pair)) for pair in adapters],
        wide(dy),
    )


@pytest.mark.parametrize(("keep", "tile"), KEEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [False, True])
def test_no_less_accurate_than_stock(device, dtype, keep, tile, trained, poisoned):
    made = inputs(dtype, device, trained=trained)
    truth = run(stock, *widened(made, torch.float64), trained=trained)
    expected = run(stock, *made, trained=trained)
    got = run(lambda *a: ours(*a, keep=keep, tile=tile), *made, trained=trained)
    for name, a, b, t in zip(
        ["y", *NAMES, "gate", "up", "down"], got, expected, truth, strict=False
    ):
        assert_no_less_accurate(a, b, t, what=name, reduced=WIDTH)


def test_keeping_or_not_gives_the_same_bits(device):
    made = inputs(torch.float32, device)
    results = [run(lambda *a, k=k: ours(*a, keep=k), *made) for k in (True, False)]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("keep", "tile"), KEEPS)
def test_keeps_what_it_says(device, keep, tile):
    made = inputs(torch.float32, device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        ours(*made[:3], keep=keep, tile=tile)
    tokens = 26
    wide = [n for n in kept if n % WIDTH == 0 and n >= 2 * WIDTH and n != tokens * D]
    assert sum(wide) == (2 * tokens * WIDTH if keep else 0)
    assert kept.count(tokens * D) == 1


def test_each_gradient_alone(device):
    made = inputs(torch.float32, device)
    together = run(ours, *made)[1:]
    for i, leaf in enumerate(leaves(*made[:3])):
        (alone,) = torch.autograd.grad(ours(*made[:3]), leaf, made[3])
        assert torch.equal(alone, together[i]), NAMES[i]


def test_a_second_backward_is_still_right(device):
    made = inputs(torch.float32, device)
    y = ours(*made[:3])
    first = torch.autograd.grad(y, leaves(*made[:3]), made[3], retain_graph=True)
    second = torch.autograd.grad(y, leaves(*made[:3]), made[3])
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_a_parameter_written_to_before_backward_is_an_error(device):
    made = inputs(torch.float32, device)
    y = ours(*made[:3])
    with torch.no_grad():
        made[2][0][0].add_(1)
    with pytest.raises(RuntimeError, match="before the optimizer's step"):
        y.backward(made[3])


def test_autocast(device):
    made = inputs(torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        y = ours(*made[:3], keep=False, tile=6)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y, leaves(*made[:3]), made[3].to(torch.bfloat16))
    truth = run(stock, *widened(made, torch.float64))[1:]
    for got, t, leaf in zip(grads, truth, leaves(*made[:3]), strict=True):
        assert got.dtype == leaf.dtype
        assert (got.double() - t).norm() < 0.03 * t.norm()
