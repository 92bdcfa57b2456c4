"""attention against stock: torch SDPA exactly as transformers' sdpa_attention_forward calls it, mask included.

    python benchmarks/bench_attention.py [OUT.json]     gate, then a table (and JSON): ours beside stock, interleaved
    python benchmarks/bench_attention.py --sweep        times candidate tiles on this card; how the launcher's table was made

FLOPs are the causal, windowed ones: 4 H N multiply-adds twice over for each visible (query, key) pair forward, 2.5 times that
backward. "% of peak" is of 800 TFLOP/s, what an 8192 cubed bfloat16 product reaches on an H100.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gemma_accel.kernels import attention as module
from gemma_accel.kernels.attention import Tile, Tiles, attention
from gemma_accel.kernels.segments import segments_from_position_ids

PEAK = 800e12


@dataclass(frozen=True)
class Case:
    name: str
    B: int
    T: int
    H: int
    N: int = 8
    K: int = 1
    window: int | None = None
    documents: int = 1  # packed in each row

    @property
    def flops(self) -> float:
        length, w = self.T // self.documents, self.window or self.T
        w = min(w, length)
        pairs = w * length - w * (w - 1) / 2
        return self.B * self.documents * pairs * 4 * self.H * self.N

    def inputs(self):
        def heads(n):
            x = torch.randn(self.B, self.T, n, self.H, device="cuda")
            return (x * x.square().mean(-1, keepdim=True).rsqrt()).bfloat16().transpose(1, 2).requires_grad_()

        return heads(self.N), heads(self.K), heads(self.K)

    def position_ids(self):
        return torch.arange(self.T // self.documents, device="cuda").repeat(self.documents).expand(self.B, -1)

    def mask(self):
        """The mask transformers' sdpa mask function builds: none where the layer is causal over the whole row."""
        if self.documents == 1 and (self.window is None or self.window >= self.T):
            return None
        t, document = torch.arange(self.T, device="cuda"), (self.position_ids() == 0).cumsum(-1)
        sees = (t[None, :] <= t[:, None]) & (t[None, :] > t[:, None] - (self.window or self.T))
        return (sees & (document[:, :, None] == document[:, None, :]))[:, None]


CASES = [
    Case("global 2x2048", 2, 2048, 512),
    Case("global 1x8192", 1, 8192, 512),
    Case("sliding 2x2048", 2, 2048, 256, window=512),
    Case("sliding 1x8192", 1, 8192, 256, window=512),
    Case("sliding 1x32768", 1, 32768, 256, window=512),
    Case("causal 256 1x8192", 1, 8192, 256),
    Case("E4B global 1x8192", 1, 8192, 512, K=2),
    Case("E4B sliding 1x8192", 1, 8192, 256, K=2, window=512),
    Case("global packed 16x512", 1, 8192, 512, documents=16),
    Case("global batch 16x512", 16, 512, 512),
    Case("sliding packed 16x512", 1, 8192, 256, window=512, documents=16),
    Case("sliding batch 16x512", 16, 512, 256, window=512),
]


def stock_forward(case):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layer = torch.nn.Module()
    layer.num_key_value_groups, layer.is_causal = case.N // case.K, True
    mask = case.mask()
    return lambda q, k, v: sdpa_attention_forward(layer, q, k, v, mask, dropout=0.0, scaling=1.0)[0]


def our_forward(case):
    segments = segments_from_position_ids(case.position_ids()) if case.documents > 1 else None
    return lambda q, k, v: attention(q, k, v, window=case.window, segments=segments)


def milliseconds(fn, rep=60):
    from triton.testing import do_bench

    return do_bench(fn, warmup=15, rep=rep, return_mode="median")


def measure(case, rounds=3):
    """Median over rounds that alternate stock and ours; forward alone, and forward with backward."""
    q, k, v = case.inputs()
    dout = torch.randn(case.B, case.T, case.N, case.H, device="cuda", dtype=torch.bfloat16)
    row = {"case": case.name, "gflop": case.flops / 1e9}
    times = {}
    for _ in range(rounds):
        for who, make in (("stock", stock_forward), ("ours", our_forward)):
            forward = make(case)
            try:
                out = forward(q, k, v)
                with torch.no_grad():
                    times.setdefault(f"{who}_forward_ms", []).append(milliseconds(lambda f=forward: f(q, k, v)))
                times.setdefault(f"{who}_backward_ms", []).append(
                    milliseconds(lambda o=out: torch.autograd.grad(o, (q, k, v), dout, retain_graph=True))
                )
            except torch.OutOfMemoryError:
                times.setdefault(f"{who}_forward_ms", []).append(float("nan"))
                times.setdefault(f"{who}_backward_ms", []).append(float("nan"))
    row |= {name: statistics.median(values) for name, values in times.items()}
    for who in ("stock", "ours"):
        row[f"{who}_ms"] = row[f"{who}_forward_ms"] + row[f"{who}_backward_ms"]
    row["speedup"] = row["stock_ms"] / row["ours_ms"]
    row["forward_tflops"] = case.flops / row["ours_forward_ms"] / 1e9
    row["backward_tflops"] = 2.5 * case.flops / row["ours_backward_ms"] / 1e9
    row["forward_share"], row["backward_share"] = (row[f"{d}_tflops"] * 1e12 / PEAK for d in ("forward", "backward"))
    row["workspace_share"] = workspace(case, q, k, v, dout)
    return row


def workspace(case, q, k, v, dout):
    """Peak memory beyond inputs, output and gradients, as a share of q + k + v + o."""
    forward = our_forward(case)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = forward(q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    size = lambda *tensors: sum(x.numel() * x.element_size() for x in tensors)  # noqa: E731
    return (torch.cuda.max_memory_allocated() - before - size(out, *grads)) / size(q, k, v, out)


def gate():
    """No number without a right answer."""
    from tests.kernels.test_attention import compare

    torch.manual_seed(0)
    for H, window in ((512, None), (256, 512), (256, None)):
        compare(2, 8, 1, 1033, H, torch.bfloat16, window=window)
    position_ids = torch.cat([torch.arange(n, device="cuda") for n in (700, 3, 512)])[None]
    compare(1, 8, 2, 1215, 512, torch.bfloat16, segments=segments_from_position_ids(position_ids))


def versions():
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    import transformers
    import triton

    return {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "commit": commit or os.environ.get("COMMIT", "unknown"),
    }


def main(out_json: str | None = None):
    gate()
    head = versions()
    print(head)
    rows = []
    print(
        f"{'case':24}{'stock fwd':>10}{'bwd':>9}{'total':>9} |{'ours fwd':>9}{'bwd':>9}{'total':>9} ms |{'speedup':>8}"
        f" |{'fwd TF/s':>9}{'%':>6}{'bwd':>6}{'%':>6} |{'workspace':>10}"
    )
    for case in CASES:
        row = measure(case)
        rows.append(row)
        print(
            f"{row['case']:24}{row['stock_forward_ms']:10.3f}{row['stock_backward_ms']:9.3f}{row['stock_ms']:9.3f} |"
            f"{row['ours_forward_ms']:9.3f}{row['ours_backward_ms']:9.3f}{row['ours_ms']:9.3f}    |{row['speedup']:7.2f}x |"
            f"{row['forward_tflops']:9.0f}{row['forward_share']:6.1%}{row['backward_tflops']:6.0f}{row['backward_share']:6.1%}"
            f" |{row['workspace_share']:10.2%}",
            flush=True,
        )
        torch.cuda.empty_cache()
    if out_json:
        Path(out_json).write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------------- sweep


def t(m, n, warps, stages, flags="", **more):
    """``flags``: e one loop (no edges), u unchain, f flip, s split, d unchain the dV programs too."""
    names = {"u": "unchain", "f": "flip", "s": "split", "d": "dv_unchain"}
    return Tile(m, n, warps, stages, "e" not in flags, **{name: f in flags for f, name in names.items()}, **more)


CANDIDATES = {
    ("fwd", 512): [t(128, 32, 8, 2, parts=2), t(64, 32, 8, 2, "u")],
    ("fwd", 256): [t(128, 64, 8, 2)],
    ("dq", 512): [t(64, 32, 8, 1, "eu"), t(64, 64, 8, 1, "eu")],
    ("dq", 256): [t(128, 32, 8, 3), t(128, 32, 8, 3, "e"), t(128, 32, 8, 2)],
    ("dkv", 512): [
        t(64, 32, 8, 1, "euf"), t(64, 32, 8, 1, "uf"), t(32, 64, 8, 1, "eusd"), t(64, 64, 8, 1, "eusd"), t(64, 16, 8, 1, "euf"),
    ],
    ("dkv", 256): [
        t(64, 32, 8, 2, "uf"), t(64, 32, 8, 2, "euf"), t(128, 32, 8, 1, "ef"), t(64, 32, 8, 2, "ef"), t(64, 64, 8, 1, "euf"),
        t(64, 64, 8, 2, "euf"), t(64, 64, 8, 2, "uf"), t(64, 16, 8, 2, "euf"), t(64, 16, 8, 3, "uf"), t(64, 32, 4, 2, "ef"),
        t(32, 64, 4, 2, "es", dv_stages=2), t(64, 64, 8, 2, "e"), t(64, 32, 8, 2, "e"), t(128, 32, 8, 1, "euf"),
    ],
}  # fmt: skip
SHAPES = {
    512: [Case("2x2048", 2, 2048, 512), Case("8192", 1, 8192, 512)],
    256: [
        Case("w 2x2048", 2, 2048, 256, window=512),
        Case("w 8192", 1, 8192, 256, window=512),
        Case("8192", 1, 8192, 256),
    ],
}
DEFAULT = module._tiles_on
NEEDS = {"dq": (True, False, False), "dkv": (False, True, True)}


def runner(kind, case, tile):
    """A call of one kernel alone (dK/dV: with the pass that computes delta) under ``tile``; and its results."""
    torch.manual_seed(1)
    q, k, v = (x.detach() for x in case.inputs())
    dout = torch.randn(case.B, case.T, case.N, case.H, device="cuda", dtype=torch.bfloat16)
    window = case.window or case.T
    module._tiles_on = DEFAULT
    out, lse = module.attention_fwd(q, k, v, 1.0, window, None)
    chosen = DEFAULT(q.device, case.H, 2)._replace(**{kind: tile})

    def call():
        module._tiles_on = lambda *_: chosen
        if kind == "fwd":
            return module.attention_fwd(q, k, v, 1.0, window, None)
        return module.attention_bwd(dout, q, k, v, out, lse, 1.0, window, None, NEEDS[kind])

    return call


def compile_ahead(job):
    """In a process of its own, so that what a candidate breaks stays broken there: compiles it and checks its result."""
    kind, size, tile = job
    try:
        case = Case("", 1, 208, size, window=100)
        results = [x for x in runner(kind, case, tile)() if x is not None]
        torch.manual_seed(1)
        inputs = [x.detach().float().requires_grad_() for x in case.inputs()]
        out = module.attention_ref(*inputs, window=100)
        dout = torch.randn(1, 208, case.N, size, device="cuda", dtype=torch.bfloat16).float()
        grads = torch.autograd.grad(out, inputs, dout)
        expected = {"fwd": (out,), "dq": grads[:1], "dkv": grads[1:]}[kind]
        off = max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(results, expected, strict=False))
        return None if off < 0.02 else f"WRONG by {off:.2g}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:90]}"


def sweep(only: str = ""):
    jobs = [(kind, size, tile) for (kind, size), tiles in CANDIDATES.items() if only in f"{kind}{size}" for tile in tiles]
    with ProcessPoolExecutor(min(12, os.cpu_count()), mp_context=get_context("spawn")) as pool:
        errors = list(pool.map(compile_ahead, jobs))
    print(versions()["card"])
    for (kind, size, tile), error in zip(jobs, errors, strict=True):
        line = f"{kind}{size} {tile.block_m:3}x{tile.block_n:<3} w{tile.num_warps} s{tile.num_stages} "
        flags = (not tile.edges, tile.unchain, tile.flip, tile.split, tile.dv_unchain)
        line += "".join(f for f, on in zip("eufsd", flags, strict=True) if on)
        line = f"{line:28}"
        if error:
            print(line, error)
            continue
        for case in SHAPES[size]:
            ms = milliseconds(runner(kind, case, tile), rep=25)
            flops = case.flops * {"fwd": 1.0, "dq": 1.5, "dkv": 2.0}[kind]
            line += f" | {case.name} {ms:7.3f} ms {flops / ms / 1e9:4.0f} TF/s"
        module._tiles_on = DEFAULT
        print(line, flush=True)


if __name__ == "__main__":
    if "--sweep" in sys.argv:
        sweep(*[a for a in sys.argv[1:] if a != "--sweep"])
    else:
        main(*sys.argv[1:])
