"""``gemma-accel demo``: the whole way on this machine, with nothing downloaded.

It writes a checkpoint with random weights, a tokenizer and a small dataset into a directory, runs
the stock TRL script of `examples/` on them through ``gemma-accel run`` in a process of its own, and
shows what came of it. The tiny size trains in seconds without a GPU and learns its text by heart.
The sizes e2b and e4b have the real models' shapes and need a GPU: they show memory and speed, and,
their weights being random, nothing about quality.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_accel.errors import GemmaAccelError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn
    from transformers import Gemma4Config

__all__ = ["SIZES", "DemoError", "config_of", "run_demo"]

EXAMPLE = Path(__file__).parent / "examples" / "sft_text.py"
SIZES = ("tiny", "e2b", "e4b")

_MARK = ".gemma-accel-demo"
_TOPICS = ("assert", "break", "continue", "pass")  # more are not learnt by heart everywhere
_ENOUGH = 20  # steps for the loss to fall by half
_PROMPT = 'The "break" statement'  # how that topic begins


class DemoError(GemmaAccelError):
    """The demo cannot run here, or did not do what it promises."""


# -- configs --------------------------------------------------------------------------------------

_TEXT: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_k_eq_v": False,
    "use_bidirectional_attention": None,
    "final_logit_softcapping": 30.0,
    "enable_moe_block": False,
    "num_experts": None,
    "top_k_experts": None,
    "moe_intermediate_size": None,
    "num_global_key_value_heads": None,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "rope_parameters": {
        "full_attention": {
            "rope_theta": 1e6,
            "rope_type": "proportional",
            "partial_rotary_factor": 0.25,
        },
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    },
}

# Every branch of E2B: per-layer embeddings, layers that share keys and values, a double-wide MLP in
# those, both layer types. The wide initialisation lets adapters alone learn a text: logits are
# bounded by the frozen, tied embedding's size. Widths are multiples of 64, for bitsandbytes' CPU
# path.
_TINY_TEXT: dict[str, Any] = {
    "vocab_size": 512,
    "vocab_size_per_layer_input": 512,
    "hidden_size": 128,
    "hidden_size_per_layer_input": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "global_head_dim": 64,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "sliding_window": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
_TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "position_embedding_size": 64,
}
_TINY_AUDIO = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "output_proj_dims": 48,
    "subsampling_conv_channels": [8, 4],
}

# The released models' own numbers.
_REAL_TEXT = {
    "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    "num_attention_heads": 8,
    "head_dim": 256,
    "global_head_dim": 512,
    "sliding_window": 512,
    "max_position_embeddings": 131072,
    "initializer_range": 0.02,
}
_E2B_TEXT = {
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 35,
    "num_key_value_heads": 1,
    "num_kv_shared_layers": 20,
    "use_double_wide_mlp": True,
}
_E4B_TEXT = {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 42,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 18,
    "use_double_wide_mlp": False,
}
_REAL_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "patch_size": 16,
    "position_embedding_size": 10240,
}
_REAL_AUDIO = {
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "output_proj_dims": 1536,
    "subsampling_conv_channels": [128, 32],
}


_MEDIA_TOKENS: dict[str, Any] = {
    "boi_token_id": 255999,
    "eoi_token_id": 258882,
    "image_token_id": 258880,
    "video_token_id": 258884,
    "boa_token_id": 256000,
    "eoa_token_index": 258883,
    "audio_token_id": 258881,
}


def config_of(size: str) -> Gemma4Config:
    """The configuration of a demo model: ``tiny``, or the real one of ``e2b`` or ``e4b``."""
    from transformers import Gemma4Config

    if size == "tiny":
        text, vision, audio = _TINY_TEXT, _TINY_VISION, _TINY_AUDIO
        period = 3
        tokens: dict[str, Any] = dict(zip(_MEDIA_TOKENS, range(505, 512), strict=True))
    else:
        text = {**_REAL_TEXT, **(_E2B_TEXT if size == "e2b" else _E4B_TEXT)}
        vision, audio = _REAL_VISION, _REAL_AUDIO
        period, tokens = (5 if size == "e2b" else 6), _MEDIA_TOKENS
    layers = range(1, text["num_hidden_layers"] + 1)
    kinds = ["sliding_attention" if layer % period else "full_attention" for layer in layers]
    shared = {"pooling_kernel_size": 3, "use_clipped_linears": True, "standardize": False}
    return Gemma4Config(
        text_config={**_TEXT, **text, "layer_types": kinds},
        vision_config={**vision, **shared},
        audio_config=audio,
        tie_word_embeddings=True,
        **tokens,
    )


# -- what is written ------------------------------------------------------------------------------


def _documentation() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DemoError(
            "the demo's text is Python's own documentation (pydoc_data.topics), which this Python "
            "was installed without. On Debian and Ubuntu: apt-get install libpython3-stdlib."
        ) from error
    return topics


def write_tokenizer(directory: Path, vocabulary: int) -> None:
    """Train a byte-level BPE tokenizer on the documentation and save it for `AutoTokenizer`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_documentation().values(), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        processor_class="AutoTokenizer",  # what AutoProcessor gives TRL: there are no images
    ).save_pretrained(directory)


def write_dataset(file: Path, size: str) -> int:
    """Write the dataset as lines of JSON; returns the number of rows.

    Tiny: four short topics, to be learnt by heart. Real: all of them, in pieces longer than a
    training row.
    """
    topics = _documentation()
    if size == "tiny":
        rows = [topics[name] for name in _TOPICS if name in topics]
    else:
        whole, piece = "\n\n".join(topics.values()), 12_000
        rows = [whole[start : start + piece] for start in range(0, len(whole) - piece, piece)]
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


def write_tiny_checkpoint(directory: Path) -> nn.Module:
    """Make the tiny model, save it, and return it."""
    import torch
    from transformers import Gemma4ForConditionalGeneration

    torch.manual_seed(0)
    model = Gemma4ForConditionalGeneration(config_of("tiny"))
    model.save_pretrained(directory)
    return model.eval()


def write_random_checkpoint(
    config: Gemma4Config, directory: Path, advance: Callable[[int], Any] = lambda nbytes: None
) -> None:
    """Write random bf16 weights as `save_pretrained` would, one module in memory at a time.

    The file is a complete one or is not there: it gets its name last. ``advance`` is told of the
    bytes as they are written.
    """
    import torch

    torch.manual_seed(0)
    model, tensors = _outline(config)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (_, tensor) in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / "model.safetensors.partial"
    with open(partial, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor in _made(model, tensors):
            for part in tensor.flatten().split(1 << 26):
                advance(file.write(part.view(torch.uint8).numpy().data))
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    config.save_pretrained(directory)
    partial.rename(directory / "model.safetensors")


def checkpoint_bytes(config: Gemma4Config) -> int:
    """What `write_random_checkpoint` writes, the header aside."""
    _, tensors = _outline(config)
    return sum(tensor.numel() * tensor.element_size() for _, tensor in tensors.values())


def _outline(config: Gemma4Config) -> tuple[Any, dict[str, tuple[nn.Module, Any]]]:
    """The model without memory, and its saved tensors, each beside its module; a tied one once."""
    import torch
    from transformers import Gemma4ForConditionalGeneration

    with torch.device("meta"):
        model: nn.Module = Gemma4ForConditionalGeneration(config)
    model = model.to(torch.bfloat16)
    saved = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    tensors = {}
    for name, tensor in saved.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = (model.get_submodule(name.rpartition(".")[0]), tensor)
    return model, tensors


def _made(model: Any, tensors: dict[str, tuple[nn.Module, Any]]) -> Iterator[Any]:
    """Each saved tensor in turn, initialised as the model would; its module then gives it up."""
    import torch
    from transformers import PreTrainedModel

    models = {path: m for path, m in model.named_modules() if isinstance(m, PreTrainedModel)}
    current = None
    for name, (module, _) in tensors.items():
        if module is not current:
            if current is not None:
                current.to_empty(device="meta", recurse=False)
            current = module.to_empty(device="cpu", recurse=False)
            with torch.no_grad():
                for own in (*module._parameters.values(), *module._buffers.values()):
                    if own is not None:
                        own.zero_()
                owner = max((p for p in models if f"{name}.".startswith(p)), key=len)
                models[owner]._init_weights(module)  # a tower has a config of its own
        yield getattr(module, name.rpartition(".")[2]).detach()


# -- the demo -------------------------------------------------------------------------------------


def run_demo(
    console: Console,
    *,
    size: str = "tiny",
    directory: Path = Path("gemma-accel-demo"),
    vram_gib: float = 7.0,
    steps: int | None = None,
) -> None:
    """Write, train, show.

    Raises:
        DemoError: it cannot run here, the training failed, or the loss did not fall as promised.
    """
    if size != "tiny":
        _need_a_gpu(console, size)
    _claim(directory)
    if size == "tiny":
        _tiny(console, directory, steps or 40)
    else:
        _real(console, directory, size, vram_gib, steps or 8)


def _need_a_gpu(console: Console, size: str) -> None:
    with console.status("looking for a GPU"):
        import torch

        found = torch.cuda.is_available()
    if not found:
        raise DemoError(
            f"--size {size} trains a model of the real shapes and needs an NVIDIA GPU; torch "
            f"{torch.__version__} finds none here. Without --size the demo runs on any machine."
        )


def _need_trl(gpu: bool) -> None:
    trl = importlib.metadata.version("trl")
    if not gpu and tuple(map(int, trl.split(".")[:2])) < (1, 16):
        raise DemoError(
            f"TRL {trl} computes its loss on a GPU only, and there is none here. Update it: "
            "pip install --upgrade trl"
        )


def _claim(directory: Path) -> None:
    """Take a new directory, an empty one, or an earlier demo's."""
    taken = directory.exists() and not (directory / _MARK).exists()
    if taken and (not directory.is_dir() or any(directory.iterdir())):
        raise DemoError(
            f"{directory} exists and is not an earlier demo's. Give another: --directory NAME."
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / _MARK).touch()
    except OSError as error:
        raise DemoError(
            f"nothing can be written to {directory} ({error.strerror}). Give another: "
            "--directory NAME."
        ) from error


def _tiny(console: Console, directory: Path, steps: int) -> None:
    model_dir, data, output = directory / "model", directory / "data.jsonl", directory / "output"
    with console.status("loading torch and transformers"):
        import torch
        from transformers import AutoTokenizer, Gemma4ForConditionalGeneration  # noqa: F401

        _need_trl(torch.cuda.is_available())
        torch.set_num_threads(1)
        _hush()
    rows = write_dataset(data, "tiny")
    _done(console, f"{data}: {rows} topics of Python's own documentation")
    with console.status("training a tokenizer on that documentation"):
        write_tokenizer(model_dir, _TINY_TEXT["vocab_size"] - 16)
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
    with console.status("writing a checkpoint"):
        model = write_tiny_checkpoint(model_dir)
        before = _continuation(model, tokenizer)
    count = sum(parameter.numel() for parameter in model.parameters())
    _done(console, f"{model_dir}: Gemma 4 in miniature, {count / 1e6:.1f} M random weights")
    _train(
        console,
        directory,
        output,
        ["--model", model_dir, "--dataset", data, "--load-in-4bit"]
        + ["--max-steps", steps, "--batch-size", 4, "--max-length", 256]
        + ["--logging-steps", max(1, min(5, steps // 4))]
        + ["--lora-rank", 16, "--lora-alpha", 32, "--learning-rate", 0.01],
        OMP_NUM_THREADS="1",  # so small a model is slower on several
    )
    with console.status("loading the adapter into a stock model"):
        after = _continuation(_stock_model(model_dir, output), tokenizer)
    report, history = _results(output)
    console.print(report)
    losses = _show_losses(console, history)
    console.print(f"\n[bold]{_PROMPT}[/bold] is continued, greedily,", highlight=False)
    for when, text in (("before training", before), ("after training", after)):
        console.print(f"[dim]{when}:[/dim]", highlight=False)
        console.print(f"{text}\n", markup=False, highlight=False)
    if steps >= _ENOUGH and not losses[-1] < losses[0] / 2:
        raise DemoError(
            f"the loss should have fallen by more than half: {losses[0]:.3f} to {losses[-1]:.3f}"
        )


def _real(console: Console, directory: Path, size: str, vram_gib: float, steps: int) -> None:
    model_dir, output = directory / f"model-{size}", directory / f"output-{size}"
    data = directory / "data-long.jsonl"
    console.print(
        f"[bold yellow]Random weights.[/bold yellow] {size.upper()} at its real shapes, with "
        "weights drawn at random: it shows memory and speed, and nothing about quality."
    )
    with console.status("loading transformers"):
        _hush()
        config = config_of(size)
        write_tokenizer(model_dir, 1024)
        write_dataset(data, size)
    if not (model_dir / "model.safetensors").exists():
        _write_with_progress(console, config, model_dir)
    _done(console, f"{model_dir}: {size.upper()}, random weights in bf16")
    _train(
        console,
        directory,
        output,
        ["--model", model_dir, "--dataset", data, "--load-in-4bit"]
        + ["--max-steps", steps, "--batch-size", 2, "--max-length", 2048, "--logging-steps", 1]
        + ["--gpu-memory-gib", vram_gib],
    )
    report, history = _results(output)
    console.print(report)
    _show_losses(console, history)
    _show_memory(console, output, history, vram_gib)


def _write_with_progress(console: Console, config: Gemma4Config, directory: Path) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn

    total = checkpoint_bytes(config)
    free = shutil.disk_usage(directory).free
    need, have = f"{total / 2**30:.1f} GiB", f"{free / 2**30:.1f} GiB free"
    if free < total + (1 << 30):
        raise DemoError(
            f"the checkpoint takes {need} and {directory} has {have}. Make room, or give another "
            "place: --directory NAME."
        )
    console.print(f"Writing {need} to {directory} ({have}).")
    columns = SpinnerColumn(), TextColumn("drawing weights"), BarColumn(), DownloadColumn(True)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)
        write_random_checkpoint(config, directory, lambda n: progress.advance(task, n))


def _train(
    console: Console, directory: Path, output: Path, arguments: list[Any], **variables: str
) -> None:
    """Run the example through ``gemma-accel run`` in a child process; pass on what it prints."""
    shutil.rmtree(output, ignore_errors=True)  # an earlier demo's
    arguments += ["--output-dir", output]
    command = ["run", str(EXAMPLE), *map(str, arguments)]
    shown = f"\n[bold]$ gemma-accel {shlex.join(command)}[/bold]"
    console.print(shown, highlight=False, soft_wrap=True)
    environment = {
        "PYTHONWARNINGS": "ignore::FutureWarning",  # upstream's, about upstream
        **variables,
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",  # everything is here
        "COLUMNS": str(console.width),
    }
    start = time.perf_counter()
    with (
        subprocess.Popen(
            [sys.executable, "-m", "gemma_accel", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
        ) as child,
        open(directory / "train.log", "wb") as log,
    ):
        _pass_on(console, child, log)
    if child.returncode:
        raise DemoError(
            f"the training ended with exit code {child.returncode}; its output is above and in "
            f"{directory / 'train.log'}"
        )
    seconds = time.perf_counter() - start
    _done(console, f"trained in a process of its own: {seconds:.0f} s, imports included")


def _pass_on(console: Console, child: subprocess.Popen[bytes], log: Any) -> None:
    assert child.stdout is not None
    waiting = console.status("starting Python; importing torch, transformers and TRL")
    waiting.start()
    out, line = sys.stdout.buffer, b""
    try:
        while chunk := os.read(child.stdout.fileno(), 1 << 16):
            waiting.stop()
            log.write(chunk)
            if not console.is_terminal:  # nobody draws over a progress bar's earlier states
                *lines, line = (line + chunk).split(b"\n")
                chunk = b"".join(whole.rpartition(b"\r")[2] + b"\n" for whole in lines)
            out.write(chunk)
            out.flush()
        if not console.is_terminal and line:
            out.write(line.rpartition(b"\r")[2] + b"\n")
    finally:
        waiting.stop()


def _results(output: Path) -> tuple[Any, list[dict[str, float]]]:
    """The report and the log history that lie in the last checkpoint."""
    from gemma_accel.report import Applied, Report, Skipped

    checkpoints = output.glob("checkpoint-*")
    checkpoint = max(checkpoints, key=lambda path: int(path.name.partition("-")[2]))
    written = json.loads((checkpoint / "gemma_accel_report.json").read_text())
    report = Report(
        applied=[Applied(**record) for record in written["applied"]],
        skipped=[Skipped(**record) for record in written["skipped"]],
        notes=written["notes"],
        versions=written["versions"],
    )
    return report, json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]


def _show_losses(console: Console, history: list[dict[str, float]]) -> list[float]:
    losses = [entry["loss"] for entry in history if "loss" in entry]
    steps, highest = max(entry["step"] for entry in history), max(losses)
    bars = "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * loss / highest))] for loss in losses)
    first, last = f"[bold]{losses[0]:.3f}[/bold]", f"[bold]{losses[-1]:.3f}[/bold]"
    console.print(f"\nLoss over {steps} steps: {first} {bars} {last}", highlight=False)
    return losses


def _show_memory(
    console: Console, output: Path, history: list[dict[str, float]], vram_gib: float
) -> None:
    from rich.table import Table

    metrics = json.loads((output / "train_results.json").read_text())
    speeds = [entry["tokens_per_second"] for entry in history if "tokens_per_second" in entry]
    table = Table(title="GPU memory, GiB reserved at most", title_justify="left")
    for column in ("loading", "loading and training", "allowed", "tokens a second"):
        table.add_column(column, justify="right")
    peaks = (metrics["gpu_load_peak_gib"], metrics["gpu_train_peak_gib"], vram_gib)
    speed = f"{statistics.median(speeds):.0f}" if speeds else "unknown"
    table.add_row(*(f"{peak:.2f}" for peak in peaks), speed)
    console.print(table)


def _stock_model(directory: Path, adapter: Path) -> Any:
    """The base, in 4 bits as it was trained, and the adapter; nothing of this package in it."""
    import torch
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, Gemma4ForConditionalGeneration

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = Gemma4ForConditionalGeneration.from_pretrained(
        directory, quantization_config=quantization, device_map={"": "cpu"}
    )
    return PeftModel.from_pretrained(base, adapter).eval()


def _continuation(model: Any, tokenizer: Any) -> str:
    prompt = tokenizer(_PROMPT, return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=100, do_sample=False)
    text = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return textwrap.indent(text.strip("\n"), "  ")


def _hush() -> None:
    """In this process: no progress bars but the demo's own, no upstream notices about upstream."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)


def _done(console: Console, text: str) -> None:
    console.print(f"[green]✓[/green] {text}", highlight=False)
