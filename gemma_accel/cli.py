"""The command line: ``gemma-accel``, or ``python -m gemma_accel``."""

from __future__ import annotations

import importlib.metadata
import io
import json
import logging
import platform
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_accel.errors import GemmaAccelError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["main"]

app = typer.Typer(
    name="gemma-accel",
    help="Fine-tune Gemma 4 on the GPU you already own.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The console script. What follows ``run`` belongs to the program, options included.

    Exit code 2 where a command cannot be carried out, as for options that do not parse: 1 is an
    answer (it does not fit, they do not agree).
    """
    if sys.argv[1:2] == ["run"]:
        from gemma_accel import run

        run.main(sys.argv[2:])
        return
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a check mark may not be in its encoding
            stream.reconfigure(errors="replace")
    # bitsandbytes misses, on some CPUs, a package for inference on them: nothing to do with us
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        app()
    except GemmaAccelError as error:
        typer.secho(f"gemma-accel: {error}", err=True, fg="red")
        sys.exit(2)


@app.command()
def demo(
    size: Annotated[str, typer.Option(help="tiny (any machine), or e2b, e4b (a GPU)")] = "tiny",
    directory: Annotated[Path, typer.Option(help="where everything is written")] = Path(
        "gemma-accel-demo"
    ),
    vram_gib: Annotated[float, typer.Option(help="GPU memory allowed to e2b and e4b, GiB")] = 7.0,
    steps: Annotated[int | None, typer.Option(min=1, help="optimizer steps")] = None,
) -> None:
    """Train a Gemma 4 made on the spot, with nothing downloaded, and show what came of it."""
    from gemma_accel.demo import SIZES, run_demo

    if size not in SIZES:
        raise typer.BadParameter(f"{size!r}: one of {', '.join(SIZES)}", param_hint="--size")
    run_demo(_console(), size=size, directory=directory, vram_gib=vram_gib, steps=steps)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    options_metavar="PROGRAM [ARGUMENT ...]",
)
def run() -> None:
    """Run a training program unedited: train.py, -m a.module, or a command such as trl sft."""
    raise AssertionError("main() sends run to gemma_accel.run")


@app.command()
def plan(
    model: Annotated[
        str, typer.Argument(help="a model's directory, its config.json, a hub id, e2b or e4b")
    ],
    vram_gib: Annotated[float, typer.Option(help="GPU memory to live in, GiB")] = 8.0,
    batch_size: Annotated[int, typer.Option(min=1)] = 2,
    sequence_length: Annotated[int, typer.Option(min=1)] = 2048,
    quantization: Annotated[str, typer.Option(help="nf4 or none")] = "nf4",
    dtype: Annotated[
        str,
        typer.Option(help="bfloat16, or float32, which TRL takes for a name unless told"),
    ] = "bfloat16",
    lora_rank: Annotated[int, typer.Option(min=0, help="0: train every weight")] = 16,
    images: Annotated[int, typer.Option(min=0, help="in each sequence, of 280 tokens")] = 0,
    sound_seconds: Annotated[
        float, typer.Option(min=0, help="in each sequence, of 25 tokens a second")
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say what would be where in GPU memory, and whether it fits. Needs no GPU.

    Exit code 1 where it does not fit.
    """
    from gemma_accel import plan as make_plan

    config = _config(model)
    try:
        result = make_plan(
            config,
            vram_gib=vram_gib,
            batch_size=batch_size,
            sequence_length=sequence_length,
            quantization=None if quantization == "none" else quantization,
            dtype=dtype,
            lora_rank=lora_rank,
            images=images,
            sound_seconds=sound_seconds,
        )
    except ValueError as error:
        raise GemmaAccelError(str(error)) from error
    if as_json:
        print(json.dumps(result.to_dict(), indent=1))
    else:
        _console().print(result)
    raise typer.Exit(0 if result.fits else 1)


@app.command()
def verify(
    model: Annotated[
        str | None,
        typer.Argument(help="a model's directory or hub id; default: a tiny one made here"),
    ] = None,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="load it in NF4")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Compare loss and gradients, patched against stock. Exit code 1 where they do not agree.

    A model that is loaded for it gets LoRA adapters, as the run that it is verified for would.
    """
    from gemma_accel import apply
    from gemma_accel import verify as compare

    network = _tiny_model() if model is None else _load(model, load_in_4bit)
    apply(network)  # its table goes where a run's would be, within reach of graphs
    result = compare(network)
    if as_json:
        print(json.dumps(result.to_dict(), indent=1))
    else:
        _console().print(result)
    raise typer.Exit(0 if result.ok else 1)


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Show versions, the card, and which patches a Gemma 4 model gets here, and why not others."""
    console = _console(stderr=as_json)
    with console.status("looking around"):
        facts = _facts()
        report = _tiny_report()
    if as_json:
        print(json.dumps({**facts, "patches": report.to_dict()}, indent=1))
        return
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, value)
    console.print(table)
    console.print(report)
    if facts["GPU"].startswith("none"):
        console.print(
            "Without a GPU the ops run their PyTorch references: the same results, no faster."
        )


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)


def _facts() -> dict[str, str]:
    import torch

    from gemma_accel import __version__

    system = platform.platform(terse=True)
    facts = {"gemma-accel": __version__, "python": f"{platform.python_version()} on {system}"}
    for name in ("torch", "triton", "transformers", "trl", "peft", "accelerate", "bitsandbytes"):
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
    if not torch.cuda.is_available():
        return {**facts, "GPU": f"none that torch {torch.__version__} can use"}
    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    facts["GPU"] = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
    facts["GPU memory"] = f"{total / 2**30:.2f} GiB, {free / 2**30:.2f} free"
    facts["table in host memory"] = _host_registration()
    return facts


def _host_registration() -> str:
    """Whether the per-layer table can stay in its file and be read by the GPU."""
    import ctypes

    import torch

    from gemma_accel.hostmemory import _driver, _Registration

    driver = _driver()
    if isinstance(driver, str):
        return f"read by the CPU: {driver}"
    supported = ctypes.c_int(0)
    device = torch.cuda.current_device()
    driver.cuDeviceGetAttribute(ctypes.byref(supported), _Registration.READ_ONLY_SUPPORTED, device)
    if supported.value:
        return "the GPU can read the checkpoint file's own pages"
    return "the GPU reads page-locked memory: it cannot register read-only pages"


def _tiny_model() -> Any:
    import torch
    from transformers import Gemma4ForConditionalGeneration

    from gemma_accel.demo import config_of

    torch.manual_seed(0)
    model: torch.nn.Module = Gemma4ForConditionalGeneration(config_of("tiny"))
    if torch.cuda.is_available():
        return model.to("cuda", torch.bfloat16)
    return model


def _tiny_report() -> Any:
    from gemma_accel import apply

    return apply(_tiny_model())


def _config(model: str) -> Any:
    from transformers import AutoConfig

    from gemma_accel.demo import config_of

    if model in ("e2b", "e4b"):
        return config_of(model)
    try:
        return AutoConfig.from_pretrained(model)
    except Exception as error:  # whatever a path or a file that is no config runs into
        raise _unreadable(model, error) from error


def _unreadable(model: str, error: Exception) -> GemmaAccelError:
    return GemmaAccelError(
        f"expected a model's directory or a hub id (plan takes a config.json, e2b and e4b too), "
        f"got {model!r}: {textwrap.shorten(str(error), 300, placeholder=' ...')} Check the path, "
        "or download the model first."
    )


_LANGUAGE = r"(?!.*_tower).*\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj"


def _load(model: str, load_in_4bit: bool) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    import gemma_accel.auto  # noqa: F401 - loads within 8 GB what stock would not

    config = _config(model)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        # as runs set it: left at float32, the projections would stay PEFT's
        bnb_4bit_compute_dtype=config.dtype,
    )
    # not None, for which Transformers would forget how the checkpoint itself is quantised
    options = {"quantization_config": four_bits} if load_in_4bit else {}
    try:
        network = AutoModelForCausalLM.from_pretrained(
            model,
            dtype="auto",
            device_map={"": 0} if torch.cuda.is_available() else None,
            **options,
        )
    except torch.OutOfMemoryError as error:
        hint = "a GPU with more memory is needed" if load_in_4bit else "give --load-in-4bit"
        raise GemmaAccelError(f"{model!r} does not fit the GPU: {hint}.") from error
    except (OSError, RuntimeError, ValueError) as error:  # no weights, or others than the config's
        raise _unreadable(model, error) from error
    return get_peft_model(network, LoraConfig(r=16, target_modules=_LANGUAGE))
