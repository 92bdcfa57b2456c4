from __future__ import annotations

import copy
from types import SimpleNamespace

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit

from gemma_accel.kernels import nf4 as module
from gemma_accel.kernels.nf4 import nf4_dequantize, nf4_dequantize_ref, nf4_refusal, nf4_weight
from tests.kernels import crosscompile

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# blocks that straddle rows, one row, a last word that is cut, several programs, several absmax2
SHAPES = [(64, 48), (3, 10), (1, 64), (7, 30), (5, 130), (96, 64), (33, 1024), (300, 64)]


def quantised(shape, dtype, *, nested=True, blocksize=64, device="cpu", quant_type="nf4"):
    """A parameter as bitsandbytes keeps it, of a weight whose blocks differ in size."""
    dense = torch.randn(shape, device=device) * 2 * torch.rand(shape[0], 1, device=device)
    packed, state = bnb.quantize_4bit(
        dense.to(dtype), blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
    )
    param = torch.nn.Parameter(packed, requires_grad=False)
    param.quant_state = state
    return param


def stock(param, dtype=None):
    """bitsandbytes' own, on the flat weight: the same blocks, and none of its CPU code's trouble
    with rows that are not a multiple of 64 wide (the numbers are padded to whole blocks)."""
    state = copy.copy(param.quant_state)
    n_rows, columns = state.shape
    blocks = -(-n_rows * columns // state.blocksize)
    state.shape, state.dtype = torch.Size((blocks, state.blocksize)), dtype or state.dtype
    packed = torch.nn.functional.pad(
        param.data.reshape(-1), (0, blocks * state.blocksize // 2 - param.numel())
    )
    flat = bnb.dequantize_4bit(packed.view(-1, 1), state).reshape(-1)
    return flat[: n_rows * columns].view(n_rows, columns)


@pytest.mark.parametrize("nested", [False, True], ids=["single", "nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bitwise_as_bitsandbytes(shape, dtype, nested, device, poisoned):
    param = quantised(shape, dtype, nested=nested, device=device)
    ours = nf4_dequantize(nf4_weight(param))
    assert ours.dtype == dtype and ours.shape == shape and ours.isfinite().all()
    torch.testing.assert_close(ours, stock(param), rtol=0, atol=0)
    reference = nf4_dequantize_ref(nf4_weight(param))
    torch.testing.assert_close(reference, stock(param), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(96, 64), (8, 192), (4, 1024)], ids=str)
def test_bitwise_as_bitsandbytes_called_as_it_is(shape, device):
    param = quantised(shape, torch.bfloat16, device=device)
    theirs = bnb.dequantize_4bit(param.data, param.quant_state)
    torch.testing.assert_close(nf4_dequantize(nf4_weight(param)), theirs, rtol=0, atol=0)


def test_stock_oracle_is_the_quantised_weight():
    """The oracle above pads and reshapes: it must still be near the weight that was quantised."""
    torch.manual_seed(3)
    param = quantised((7, 30), torch.float32, nested=False)
    torch.manual_seed(3)
    dense = torch.randn(7, 30) * 2 * torch.rand(7, 1)
    error = (stock(param) - dense).norm() / dense.norm()
    assert 0 < error < 0.15


@pytest.mark.parametrize("shape", [(64, 48), (9, 15), (40, 10), (6, 256)], ids=str)
def test_rows(shape, device, poisoned):
    param = quantised(shape, torch.bfloat16, device=device)
    w, whole = nf4_weight(param), stock(param)
    n = shape[0]
    for start, stop in [(0, n), (0, 1), (1, 2), (1, n), (3, n - 2), (n - 1, n), (2, 2)]:
        for dequantize in (nf4_dequantize, nf4_dequantize_ref):
            ours = dequantize(w, rows=(start, stop))
            assert ours.shape == (stop - start, shape[1])
            torch.testing.assert_close(ours, whole[start:stop], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounds_once_to_the_dtype_asked_for(dtype, device):
    param = quantised((16, 64), torch.bfloat16, device=device)
    ours = nf4_dequantize(nf4_weight(param), dtype=dtype)
    torch.testing.assert_close(ours, stock(param, dtype), rtol=0, atol=0)
    if dtype is torch.float32:
        assert not torch.equal(ours, ours.bfloat16().float())


@pytest.mark.parametrize("blocksize", [32, 128, 1024])
def test_other_blocksizes(blocksize, device):
    param = quantised((40, 128), torch.float32, blocksize=blocksize, device=device)
    ours = nf4_dequantize(nf4_weight(param), rows=(1, 39))
    torch.testing.assert_close(ours, stock(param)[1:39], rtol=0, atol=0)


@pytest.mark.parametrize("references", [False, True])
def test_out_is_written_and_nothing_beside_it(references, device, monkeypatch):
    if references:
        monkeypatch.setattr(module, "use_kernel", lambda x: False)
    param = quantised((8, 48), torch.bfloat16, device=device)
    buffer = torch.full((6 * 48,), 7.0, dtype=torch.bfloat16, device=device)
    out = buffer[48:-48].view(4, 48)
    assert nf4_dequantize(nf4_weight(param), rows=(3, 7), out=out) is out
    torch.testing.assert_close(out, stock(param)[3:7], rtol=0, atol=0)
    assert (buffer[:48] == 7).all() and (buffer[-48:] == 7).all()


def test_repeat_run_is_bitwise_equal(device):
    w = nf4_weight(quantised((33, 64), torch.float16, device=device))
    assert torch.equal(nf4_dequantize(w), nf4_dequantize(w))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_weight_of_a_linear4bit(storage, device):
    """The real parameter, whatever dtype its bytes are kept in: views of its own tensors."""
    layer = Linear4bit(128, 64, bias=False, quant_type="nf4", quant_storage=storage)
    layer = layer.to(torch.bfloat16).to(device).train()
    w = nf4_weight(layer.weight)
    state = layer.weight.quant_state
    assert type(w.packed) is torch.Tensor and w.packed.dtype is torch.uint8
    assert w.packed.data_ptr() == layer.weight.data.data_ptr()
    assert w.absmax is state.absmax and w.code2 is state.state2.code and w.offset is state.offset
    assert w.shape == (64, 128) and (w.blocksize, w.blocksize2) == (64, 256)
    theirs = bnb.dequantize_4bit(layer.weight.data, state)
    torch.testing.assert_close(nf4_dequantize(w), theirs, rtol=0, atol=0)


def test_refuses_with_a_reason():
    assert nf4_refusal(quantised((4, 64), torch.float32)) is None
    repacked = quantised((4, 64), torch.float32)
    repacked.quant_state.packing_format_for_cpu = True
    vector = quantised((4, 64), torch.float32)
    vector.quant_state.shape = torch.Size((256,))
    refused = [
        (quantised((4, 64), torch.float32, quant_type="fp4"), "'fp4'"),
        (repacked, "repacked"),
        (torch.nn.Parameter(torch.ones(2, 2)), "no quant_state"),
        (SimpleNamespace(quant_state=None), "no quant_state"),
    ]
    for param, reason in refused:
        assert reason in nf4_refusal(param)
        with pytest.raises(ValueError, match=reason):
            nf4_weight(param)
    assert "matrices" in nf4_refusal(vector)


def test_says_what_is_wrong(device):
    w = nf4_weight(quantised((4, 64), torch.float32, device=device))
    for rows in [(0, 5), (-1, 2), (3, 2)]:
        with pytest.raises(ValueError, match="rows must be"):
            nf4_dequantize(w, rows=rows)
    for out in (torch.empty(4, 32, device=device), torch.empty(64, 4, device=device).t()):
        with pytest.raises(ValueError, match="out must be contiguous"):
            nf4_dequantize(w, out=out)


def cross_compile_cases() -> list[crosscompile.Case]:
    cases = []
    for out, nested in [("*bf16", True), ("*fp32", True), ("*fp16", False)]:
        signature = {"packed_ptr": "*u8", "absmax_ptr": "*u8" if nested else "*fp32"}
        signature |= {"code_ptr": "*fp32", "out_ptr": out}
        constants = {"HAS_ABSMAX2": nested, "WORDS_PER_BLOCK": 8, "BLOCKSIZE2": 256}
        constants["BLOCK_W"] = module.BLOCK_W
        for name in ("absmax2_ptr", "code2_ptr", "offset_ptr"):
            if nested:
                signature[name] = "*fp32"
            else:
                constants[name] = None
        integers = ("first_word", "skip", "n_elements", "n_bytes")
        cases.append(
            crosscompile.Case(
                f"nf4_dequantize {out[1:]} {'nested' if nested else 'single'}",
                module._nf4_dequantize_kernel,
                signature | {name: "i32" for name in integers},
                constants,
                aligned=integers,
                capabilities=(80, 86, 89, 90, 120) if out == "*bf16" else (89,),
                options={"enable_fp_fusion": False},
            )
        )
    return cases


def test_compiles_for_every_card():
    rows = crosscompile.check(__name__)
    assert len(rows) == 7
    for row in rows:
        assert row.fits and row.spill_bytes == 0, row
