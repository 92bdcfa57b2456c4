"""Compiles shipped kernel configurations for every card we promise, without a card.

A test module lists what its op launches in ``cross_compile_cases()``; ``check(module)`` compiles
those in a child process (kernels are decided to be interpreted or compiled when they are defined,
and this process interprets) and returns what ptxas and the cubin say of each. Run by hand for a
table: ``python -m tests.kernels.crosscompile tests.kernels.test_rms_norm``.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Shared memory a block may take, KiB: CUDA C++ Programming Guide, table "Technical specifications
# per compute capability".
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}


@dataclass
class Case:
    """One kernel as its launcher launches it.

    ``signature`` maps each non-constexpr argument to its Triton type (``"*bf16"``, ``"i32"``,
    ``"fp32"``); ``constants`` holds the constexpr arguments; ``aligned`` the arguments that are
    divisible by 16 at run time (Triton specialises on it; pointers from the allocator always are).
    ``capabilities`` limits a configuration to the cards that choose it.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    capabilities: tuple[int, ...] = tuple(SHARED_KIB)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Resources:
    name: str
    capability: int
    shared_bytes: int
    registers: int
    spill_bytes: int

    @property
    def fits(self) -> bool:
        return self.shared_bytes <= SHARED_KIB[self.capability] * 1024


def compile_case(case: Case, capability: int) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    pointers = tuple(n for n, t in case.signature.items() if t.startswith("*"))
    attrs = {
        (names.index(n),): [["tt.divisibility", 16]]
        for n in dict.fromkeys((*pointers, *case.aligned))
    }
    signature = {n: case.signature.get(n, "constexpr") for n in names}
    constants = {(names.index(n),): v for n, v in case.constants.items()}
    source = ASTSource(case.kernel, signature, constants, attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spill = _resources(binary.asm["cubin"])
    return Resources(case.name, capability, binary.metadata.shared, registers, spill)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of local memory (spills and stack) from the cubin's own resource
    table.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2]) + int(found[3])


def check(module: str, *, jobs: int = 2) -> list[Resources]:
    """Every case of ``module.cross_compile_cases()`` on every card it names, compiled in a child
    process.
    """
    child = subprocess.run(
        [sys.executable, "-m", __name__, module, "--json", "--jobs", str(jobs)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    return [Resources(**row) for row in json.loads(child.stdout.splitlines()[-1])]


def _compile_indexed(job: tuple[str, int, int]) -> Resources:
    module, index, capability = job
    return compile_case(importlib.import_module(module).cross_compile_cases()[index], capability)


def main(argv: list[str]) -> None:
    from concurrent.futures import ProcessPoolExecutor

    module, as_json = argv[0], "--json" in argv
    jobs = int(argv[argv.index("--jobs") + 1]) if "--jobs" in argv else 2
    cases = importlib.import_module(module).cross_compile_cases()
    work = [(module, i, cap) for i, case in enumerate(cases) for cap in case.capabilities]
    with ProcessPoolExecutor(jobs) as pool:
        rows = list(pool.map(_compile_indexed, work))
    if as_json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    for row in rows:
        limit = SHARED_KIB[row.capability]
        print(
            f"{row.name:48} sm_{row.capability:<4} {row.shared_bytes / 1024:6.1f} of {limit} KiB  "
            f"{row.registers:3} registers  {row.spill_bytes} B "
            f"spilled{'' if row.fits else '  DOES NOT FIT'}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
