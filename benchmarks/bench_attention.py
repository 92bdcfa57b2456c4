"""attention against stock: torch SDPA as transformers' sdpa_attention_forward calls it, mask too.

    python -m benchmarks.bench_attention [OUT.json]     gate, then a table: stock and ours in turn
    python -m benchmarks.bench_attention --sweep [WHICH]    times candidate tiles on this card: how
                                                            the launcher's table was made

FLOPs are the causal, windowed ones: 4 H N for each visible (query, key) pair forward, 2.5 times as
many backward. "%" is of 800 TFLOP/s, what an 8192 cubed bfloat16 product reaches on an H100. Times
are the device's own (`benchmarks.harness.device_ms`): in a training step, launches are queued or
replayed and the host's time for them is not theirs.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.harness import device_ms, where
from gemma_accel.kernels import attention as module
from gemma_accel.kernels.attention import Tile, attention
from gemma_accel.kernels.segments import segments_from_position_ids

PEAK = 800e12
CALLS = 15


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
        length = self.T // self.documents
        w = min(self.window or length, length)
        pairs = w * length - w * (w - 1) / 2
        return self.B * self.documents * pairs * 4 * self.H * self.N

    def inputs(self):
        def heads(n):
            x = torch.randn(self.B, self.T, n, self.H, device="cuda")
            x = x * x.square().mean(-1, keepdim=True).rsqrt()
            return x.bfloat16().transpose(1, 2).requires_grad_()

        return heads(self.N), heads(self.K), heads(self.K)

    def dout(self):
        return torch.randn(self.B, self.T, self.N, self.H, device="cuda", dtype=torch.bfloat16)

    def position_ids(self):
        document = torch.arange(self.T // self.documents, device="cuda")
        return document.repeat(self.documents).expand(self.B, -1)

    def mask(self):
        """As transformers' sdpa mask function builds it: none where a layer is plainly causal."""
        if self.documents == 1 and (self.window is None or self.window >= self.T):
            return None
        t = torch.arange(self.T, device="cuda")
        document = (self.position_ids() == 0).cumsum(-1)
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
    segments = None
    if case.documents > 1:
        segments = segments_from_position_ids(case.position_ids())
    return lambda q, k, v: attention(q, k, v, window=case.window, segments=segments)


def timed(forward, q, k, v, dout):
    """Forward alone, and backward alone."""
    try:
        with torch.no_grad():
            before = device_ms(lambda: forward(q, k, v), CALLS)
        out = forward(q, k, v)
        grad = torch.autograd.grad
        backward = device_ms(lambda: grad(out, (q, k, v), dout, retain_graph=True), CALLS)
        return before, backward
    except torch.OutOfMemoryError:
        return float("nan"), float("nan")


def measure(case, rounds=3):
    """Medians over rounds that alternate stock and ours."""
    q, k, v = case.inputs()
    dout = case.dout()
    times = {"stock": [], "ours": []}
    for _ in range(rounds):
        for who, make in (("stock", stock_forward), ("ours", our_forward)):
            times[who].append(timed(make(case), q, k, v, dout))
    row = {"case": case.name, "gflop": case.flops / 1e9}
    for who, pairs in times.items():
        forward, backward = (statistics.median(x) for x in zip(*pairs, strict=True))
        row[f"{who}_forward_ms"], row[f"{who}_backward_ms"] = forward, backward
        row[f"{who}_ms"] = forward + backward
    row["speedup"] = row["stock_ms"] / row["ours_ms"]
    for way, factor in (("forward", 1.0), ("backward", 2.5)):
        row[f"{way}_tflops"] = factor * case.flops / row[f"ours_{way}_ms"] / 1e9
        row[f"{way}_share"] = row[f"{way}_tflops"] * 1e12 / PEAK
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
    extra = torch.cuda.max_memory_allocated() - before - size(out, *grads)
    return extra / size(q, k, v, out)


def gate():
    """No number without a right answer."""
    from tests.kernels.test_attention import compare

    torch.manual_seed(0)
    for H, window in ((512, None), (256, 512), (256, None)):
        compare(2, 8, 1, 1033, H, torch.bfloat16, window=window)
    position_ids = torch.cat([torch.arange(n, device="cuda") for n in (700, 3, 512)])[None]
    segments = segments_from_position_ids(position_ids)
    compare(1, 8, 2, 1215, 512, torch.bfloat16, segments=segments)


HEADINGS = ("stock fwd", "bwd", "total", "ours fwd", "bwd", "total", "speedup")
RATES = ("fwd TF/s", "%", "bwd TF/s", "%", "workspace")


def line(row):
    cells = [
        row[f"{who}_{x}"] for who in ("stock", "ours") for x in ("forward_ms", "backward_ms", "ms")
    ]
    text = f"{row['case']:24}" + "".join(f"{x:10.3f}" for x in cells) + f"{row['speedup']:9.2f}x"
    for way in ("forward", "backward"):
        text += f"{row[f'{way}_tflops']:10.0f}{row[f'{way}_share']:10.1%}"
    return text + f"{row['workspace_share']:10.2%}"


def main(out_json: str | None = None):
    gate()
    head = where()
    print(head)
    print(f"{'milliseconds':24}" + "".join(f"{x:>10}" for x in (*HEADINGS, *RATES)))
    rows = []
    for case in CASES:
        rows.append(measure(case))
        print(line(rows[-1]), flush=True)
        torch.cuda.empty_cache()
    if out_json:
        Path(out_json).write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


# -------------------------------------------------------------------------------------------- sweep


def t(m, n, warps, stages, flags="", **more):
    """``flags``: e one loop (no edges), u unchain, f flip."""
    return Tile(m, n, warps, stages, "e" not in flags, "u" in flags, flip="f" in flags, **more)


# The H100's: its table holds the first of each list. Others that were tried are in LOG.md.
CANDIDATES = {
    ("fwd", 512): [
        t(128, 32, 8, 2, parts=2),
        t(128, 32, 8, 2, "e", parts=2),
        t(64, 32, 8, 2, "u"),
        t(64, 32, 8, 2),
    ],
    ("fwd", 256): [
        t(128, 64, 8, 2),
        t(128, 64, 8, 2, "e"),
        t(128, 32, 8, 3),
        t(64, 32, 4, 2),
    ],
    ("dq", 512): [t(64, 32, 8, 1, "eu"), t(64, 32, 8, 1, "u"), t(64, 32, 8, 1, "e")],
    ("dq", 256): [t(128, 32, 8, 3), t(128, 32, 8, 3, "e"), t(128, 32, 8, 2), t(64, 64, 8, 2, "u")],
    ("dkv", 512): [t(64, 32, 8, 1, "euf"), t(64, 32, 8, 1, "uf")],
    ("dkv", 256): [
        t(64, 32, 8, 2, "uf"),
        t(64, 32, 8, 2, "euf"),
        t(64, 64, 8, 2, "uf"),
        t(128, 32, 8, 1, "ef"),
        t(64, 32, 8, 2, "e"),
        t(64, 64, 8, 2, "e"),
    ],
}
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
    """A call of one kernel alone (dK/dV: with the pass that computes delta) under ``tile``."""
    torch.manual_seed(1)
    q, k, v = (x.detach() for x in case.inputs())
    dout = case.dout()
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
    """Compiles a candidate and checks its result, in a process where its faults stay."""
    kind, size, tile = job
    try:
        case = Case("", 1, 208, size, window=100)
        results = [x for x in runner(kind, case, tile)() if x is not None]
        torch.manual_seed(1)
        inputs = [x.detach().float().requires_grad_() for x in case.inputs()]
        out = module.attention_ref(*inputs, window=100)
        grads = torch.autograd.grad(out, inputs, case.dout().float())
        expected = {"fwd": (out,), "dq": grads[:1], "dkv": grads[1:]}[kind]
        pairs = zip(results, expected, strict=False)
        off = max(((a.float() - b).norm() / b.norm()).item() for a, b in pairs)
        return None if off < 0.02 else f"WRONG by {off:.2g}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:90]}"


def sweep(only: str = ""):
    jobs = [
        (kind, size, tile)
        for (kind, size), candidates in CANDIDATES.items()
        if only in f"{kind}{size}"
        for tile in candidates
    ]
    workers = min(12, os.cpu_count())
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        errors = list(pool.map(compile_ahead, jobs))
    print(torch.cuda.get_device_name())
    for (kind, size, tile), error in zip(jobs, errors, strict=True):
        flags = zip("euf", (not tile.edges, tile.unchain, tile.flip), strict=True)
        text = f"{kind}{size} {tile.block_m:3}x{tile.block_n:<3} w{tile.num_warps} "
        text += f"s{tile.num_stages} p{tile.parts} {''.join(f for f, on in flags if on):4}"
        if error:
            print(text, error)
            continue
        for case in SHAPES[size]:
            ms = device_ms(runner(kind, case, tile), CALLS)
            flops = case.flops * {"fwd": 1.0, "dq": 1.5, "dkv": 2.0}[kind]
            text += f" | {case.name} {ms:7.3f} ms {flops / ms / 1e9:4.0f} TF/s"
        print(text, flush=True)
    module._tiles_on = DEFAULT


if __name__ == "__main__":
    if "--sweep" in sys.argv:
        sweep(*[a for a in sys.argv[1:] if a != "--sweep"])
    else:
        main(*sys.argv[1:])
