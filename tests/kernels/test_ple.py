from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from gemma_accel.kernels import ple as module
from gemma_accel.kernels import rms_norm as shared
from gemma_accel.kernels.ple import HostRows, gather_rows, gather_rows_ref, ple_gate, ple_gate_ref
from gemma_accel.kernels.rms_norm import row_tile
from tests.accuracy import assert_no_less_accurate, assert_same_but_for_rounding
from tests.kernels import crosscompile
from tests.kernels.test_rms_norm import stock as stock_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bits(x):
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def make_table(dtype, rows=37, columns=96):
    """Every kind of bit pattern: a copy must keep NaN payloads, infinities and negative zeros."""
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    info = torch.iinfo(integers)
    return torch.randint(info.min, info.max, (rows, columns), dtype=integers).view(dtype)


def host_rows(table):
    """Raw memory that a CUDA device can read too, with the tensor that keeps it alive."""
    table = table.pin_memory() if torch.cuda.is_available() else table
    return HostRows(table.data_ptr(), *table.shape, table.dtype), table


@pytest.fixture(params=["tensor", "host"])
def source(request, device):
    """Makes a table of the kind under test from a CPU tensor; the tensor lives as long as it."""
    alive = []

    def make(table):
        if request.param == "tensor":
            return table.to(device)
        rows, kept = host_rows(table)
        alive.append(kept)
        return rows

    return make


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("start", "width"), [(0, 96), (32, 32), (40, 8), (3, 7), (95, 1)])
def test_gather_is_indexing_bit_for_bit(start, width, dtype, source, device, poisoned):
    table = make_table(dtype)
    ids = torch.randint(0, 37, (3, 13))
    ids[0, :2] = torch.tensor([0, 36])
    got = gather_rows(source(table), ids.to(device), start, width)
    assert got.dtype == dtype and got.is_contiguous()
    assert torch.equal(bits(got.cpu()), bits(table[ids, start : start + width]))


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3, 4), (300,)], ids=str)
def test_gather_ids_of_any_shape(shape, ids_dtype, source, device, poisoned):
    table = make_table(torch.bfloat16)
    ids = torch.randint(0, 37, shape, dtype=ids_dtype)
    got = gather_rows(source(table), ids.to(device), 32, 16)
    assert torch.equal(bits(got.cpu()), bits(table[ids.long(), 32:48]))


def test_gather_ids_of_any_strides(source, device, poisoned):
    table = make_table(torch.bfloat16)
    ids = torch.randint(0, 37, (6, 8))
    for view in (lambda x: x[:, ::2], lambda x: x.t(), lambda x: x[1:2].expand(4, 8)):
        got = gather_rows(source(table), view(ids.to(device)), 0, 16)
        assert torch.equal(bits(got.cpu()), bits(table[view(ids), :16]))


def test_gather_wide_rows(source, device, poisoned):
    """More columns than one program takes."""
    table = make_table(torch.float16, rows=3, columns=2600)
    got = gather_rows(source(table), torch.tensor([2, 0], device=device), 16, 2500)
    assert torch.equal(bits(got.cpu()), bits(table[[2, 0], 16:2516]))


@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_gather_from_an_address_of_any_alignment(offset, device, poisoned):
    """A tensor in a safetensors file begins wherever its header ends."""
    rows, kept = host_rows(make_table(torch.bfloat16, 1, 37 * 96 + 16).view(-1)[None])
    table = kept.view(-1)[offset : offset + 37 * 96].view(37, 96)
    rows = HostRows(table.data_ptr(), 37, 96, torch.bfloat16)
    ids = torch.randint(0, 37, (50,))
    got = gather_rows(rows, ids.to(device), 32, 32)
    assert torch.equal(bits(got.cpu()), bits(table[ids, 32:64]))


def test_gather_columns_of_a_wider_tensor(device):
    table = make_table(torch.bfloat16).to(device)
    ids = torch.randint(0, 37, (5,), device=device)
    got = gather_rows(table[:, 8:72], ids, 16, 32)
    assert torch.equal(bits(got), bits(table[ids, 24:56]))


def test_an_id_outside_the_table_gives_nan_and_reads_nothing(source, device):
    table = torch.randn(37, 96, dtype=torch.bfloat16)
    ids = torch.tensor([5, 37, -1, 2**40, 6], device=device)
    got = gather_rows(source(table), ids, 0, 16).cpu()
    assert got.isnan().all(1).tolist() == [False, True, True, True, False]
    assert torch.equal(got[[0, 4]], table[[5, 6], :16])


def test_gather_on_another_device_than_the_ids(source, device):
    table = make_table(torch.bfloat16)
    ids = torch.randint(0, 37, (5,))
    got = gather_rows(source(table), ids, 0, 16, device=device)
    assert got.device.type == device and torch.equal(bits(got.cpu()), bits(table[ids, :16]))


def test_gather_reference_stands_in_without_a_card(references):
    table = make_table(torch.bfloat16)
    ids = torch.randint(0, 37, (2, 5), dtype=torch.int32)
    want = bits(table[ids.long(), 32:48])
    for kind in (table, host_rows(table)[0]):
        assert torch.equal(bits(gather_rows(kind, ids, 32, 16)), want)
        assert torch.equal(bits(gather_rows_ref(kind, ids, 32, 16)), want)
        for outside in (37, -1):
            with pytest.raises(IndexError):
                gather_rows(kind, torch.tensor([outside]), 0, 16)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": torch.tensor([1.0])}, TypeError, "ids must be int32 or int64, got torch.float32"),
        ({"start": 90}, ValueError, "columns 90 to 106 are not all in a table of 96"),
        ({"start": -1}, ValueError, "columns -1 to 15"),
        ({"width": 0}, ValueError, "columns 0 to 0"),
        ({"table": torch.ones(37, 96, dtype=torch.int8)}, TypeError, "got torch.int8"),
        ({"table": torch.ones(37, 96, device="meta")}, ValueError, "got meta. Move the ids there"),
        ({"table": torch.ones(96, 37).t()}, ValueError, "with contiguous rows, got shape"),
        ({"table": torch.ones(37, 96).requires_grad_()}, ValueError, "requires a gradient, and"),
    ],
)
def test_gather_errors(change, error, message):
    arguments = {"table": torch.ones(37, 96), "ids": torch.tensor([1]), "start": 0, "width": 16}
    with pytest.raises(error, match=message):
        gather_rows(**{**arguments, **change})


SCALES = {"projection_scale": 1536**-0.5, "rows_scale": 16.0, "input_scale": 2.0**-0.5}
SHAPES = [(1, 8), (3, 5, 40), (2, 7, 256), (70, 64)]
NAMES = ("gate", "projection", "rows", "norm_weight")


def stock(gate, projection, rows, norm_weight):
    """Stock's project_per_layer_inputs, its scaled embedding, and the gate of its layer."""
    projection = projection * SCALES["projection_scale"]
    rows = rows * torch.tensor(SCALES["rows_scale"]).to(rows)
    per_layer_input = (stock_norm(projection, norm_weight) + rows) * SCALES["input_scale"]
    return F.gelu(gate, approximate="tanh") * per_layer_input


def ours(**inputs):
    return ple_gate(**inputs, **SCALES)


def reference(**inputs):
    return ple_gate_ref(**inputs, **SCALES)


def make(shape, dtype, device):
    inputs = {
        "gate": torch.randn(shape) * 10.0 ** torch.randint(-2, 2, shape),
        "projection": torch.randn(shape) * 10.0 ** torch.randint(0, 4, (*shape[:-1], 1)),
        "rows": torch.randn(shape) * 0.05,
        "norm_weight": torch.randn(shape[-1]) + 0.5,
    }
    dout = torch.randn(shape)
    return {name: x.to(device, dtype) for name, x in inputs.items()}, dout.to(device, dtype)


def run(op, inputs, dout, dtype=None, *, wanted=NAMES):
    inputs = {name: x.detach().to(dtype or x.dtype) for name, x in inputs.items()}
    for name in wanted:
        inputs[name].requires_grad_()
    out = op(**inputs)
    out.backward(dout.to(out.dtype))
    return {"out": out} | {f"d{name}": inputs[name].grad for name in wanted}


def assert_accurate(inputs, dout):
    got, eager, truth = (
        run(op, inputs, dout, dtype)
        for op, dtype in ((ours, None), (stock, None), (stock, torch.float64))
    )
    width = dout.shape[-1]
    reduced = max(width, dout.numel() // width)
    for what in truth:
        assert_no_less_accurate(got[what], eager[what], truth[what], what=what, reduced=reduced)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_less_accurate_than_stock(shape, dtype, device, poisoned):
    got = assert_accurate(*make(shape, dtype, device))
    assert got["out"].is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype, device, poisoned):
    inputs, dout = make((4, 3, 24), dtype, device)
    want = run(ours, inputs, dout)

    def layer(x):
        """One layer's slice of [B, T, layers, P]."""
        wide = torch.full((*x.shape[:-1], 3, x.shape[-1]), float("nan"), dtype=dtype, device=device)
        wide[..., 1, :] = x
        return wide[..., 1, :]

    def columns(x):
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)

    for change in (layer, columns):
        changed = inputs | {name: change(inputs[name]) for name in NAMES[:3]}
        assert not changed["rows"].is_contiguous()
        got = run(ours, changed, change(dout))
        assert all(torch.equal(got[k], want[k]) for k in want)


@pytest.mark.parametrize("wanted", [c for k in (1, 2) for c in itertools.combinations(NAMES, k)])
def test_gradients_alone_and_in_pairs(wanted, device, poisoned):
    inputs, dout = make((70, 8), torch.float32, device)
    every, some = run(ours, inputs, dout), run(ours, inputs, dout, wanted=wanted)
    for name in wanted:
        assert_same_but_for_rounding(some[f"d{name}"], every[f"d{name}"], what=name)


def test_weight_gradient_over_more_tiles_than_partial_sums(device, monkeypatch, poisoned):
    monkeypatch.setattr(shared, "PARTIAL_SUMS", 3)
    assert_accurate(*make((4 * 256 + 9, 8), torch.float32, device))


def test_mixed_dtypes(device, poisoned):
    """Under autocast the projections are bfloat16 and a float32 model's table is not."""
    inputs, dout = make((6, 32), torch.float32, device)
    inputs |= {name: inputs[name].bfloat16() for name in ("gate", "projection")}
    got = assert_accurate(inputs, dout)
    assert [got[k].dtype for k in ("out", "dgate", "drows")] == [
        torch.float32,
        torch.bfloat16,
        torch.float32,
    ]


def test_a_layer_end_to_end(device):
    """The gather and the gate together, against stock's tensor of all layers."""
    layers, width, vocabulary = 3, 16, 11
    table = torch.randn(vocabulary, layers * width, dtype=torch.float32)
    rows, kept = host_rows(table)
    ids = torch.randint(0, vocabulary, (2, 5))
    inputs, _ = make((2, 5, width), torch.float32, device)
    for layer in range(layers):
        inputs["rows"] = gather_rows(rows, ids, layer * width, width, device=device)
        every = F.embedding(ids, kept).view(2, 5, layers, width)[:, :, layer].to(device)
        torch.testing.assert_close(ours(**inputs), stock(**inputs | {"rows": every}))


def test_no_rows(device):
    got = run(ours, *make((0, 16), torch.float32, device))
    assert got["out"].shape == got["dgate"].shape == (0, 16)
    assert got["dnorm_weight"].count_nonzero() == 0


def test_repeat_run_is_bitwise_the_same(device):
    inputs, dout = make((700, 8), torch.float32, device)
    first, second = (run(ours, inputs, dout) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_kernel_equals_reference(device):
    inputs, dout = make((4, 48), torch.float32, device)
    got, want = run(ours, inputs, dout), run(reference, inputs, dout)
    for what in want:
        torch.testing.assert_close(got[what], want[what])


def test_reference_gradients():
    inputs = [torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    inputs.append(torch.randn(7, dtype=torch.float64, requires_grad=True))
    scales = {"projection_scale": 0.7, "rows_scale": 1.3, "input_scale": 0.6}
    assert torch.autograd.gradcheck(lambda *values: ple_gate_ref(*values, **scales), inputs)


def test_reference_stands_in_without_a_card(references):
    inputs, _ = make((3, 8), torch.float64, "cpu")
    assert torch.equal(ours(**inputs), reference(**inputs))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda i: {"norm_weight": i["gate"]}, ValueError, r"norm_weight must have shape \(D,\)"),
        (lambda i: {"rows": i["rows"][:1]}, ValueError, r"rows must be like gate, \(3, 16\)"),
        (lambda i: {"projection": i["projection"].to("meta")}, ValueError, "projection .* on meta"),
        (lambda i: {"rows": i["rows"].double()}, TypeError, "rows must be float32, bfloat16"),
    ],
)
def test_gate_errors(change, error, message, device):
    inputs, _ = make((3, 16), torch.float32, device)
    with pytest.raises(error, match=message):
        ours(**{**inputs, **change(inputs)})


def cross_compile_cases() -> list[crosscompile.Case]:
    case = crosscompile.Case
    cases = [
        case(
            f"gather_rows width={width} aligned={aligned}",
            module._gather_rows_kernel,
            {"address": "i64", "ids_ptr": "*i64", "out_ptr": "*bf16", "n_ids": "i32"}
            | dict.fromkeys(("table_rows", "table_row_stride", "start", "width"), "i32"),
            {"ids_stride": 1, "ALIGNED": aligned, "BLOCK_R": 2048 // block, "BLOCK_W": block},
            aligned=("table_row_stride", "width"),
            capabilities=capabilities,
        )
        for width, block, aligned, capabilities in (
            (256, 256, 16, (86, 89, 120)),
            (8960, 1024, 8, (80, 90)),
        )
    ]
    block_r, block_p, num_warps = row_tile(256)
    tile = {"P": 256, "BLOCK_R": block_r, "BLOCK_P": block_p}
    inputs = ("gate_ptr", "projection_ptr", "rows_ptr", "weight_ptr")
    strides = ("gate_row_stride", "projection_row_stride", "rows_row_stride")
    scalars = dict.fromkeys(("eps", "projection_scale", "rows_scale", "input_scale"), "fp32")
    cases.append(
        case(
            "ple_gate_fwd P=256",
            module._ple_gate_fwd_kernel,
            dict.fromkeys((*inputs, "out_ptr"), "*bf16")
            | dict.fromkeys(("n_rows", *strides), "i32")
            | scalars,
            tile,
            num_warps=num_warps,
            aligned=strides,
        )
    )
    strides += ("dout_row_stride",)
    for trained in (False, True):
        results = ("dgate_ptr", "dprojection_ptr", *(("drows_ptr",) if trained else ()))
        absent = {} if trained else dict.fromkeys(("drows_ptr", "dw_ptr"))
        cases.append(
            case(
                f"ple_gate_bwd P=256{' dw drows' * trained}",
                module._ple_gate_bwd_kernel,
                dict.fromkeys(("dout_ptr", *inputs, *results), "*bf16")
                | dict.fromkeys(("n_rows", "rows_per_program", *strides), "i32")
                | ({"dw_ptr": "*fp32"} if trained else {})
                | scalars,
                {**tile, "HAS_DGATE": True, "HAS_DPROJECTION": True, **absent}
                | {"HAS_DROWS": trained, "HAS_DW": trained},
                num_warps=num_warps,
                aligned=strides,
                capabilities=(86, 89, 90) if trained else (80, 86, 120),
            )
        )
    return cases


def test_compiles_for_every_card_without_spills():
    rows = crosscompile.check(__name__)
    assert {row.capability for row in rows} == set(crosscompile.SHARED_KIB)
    assert [row for row in rows if not row.fits or row.spill_bytes] == []
