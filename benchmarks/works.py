"""The works every stack is measured on, and what they need: checkpoints of real shapes, data,
arithmetic counts.

Weights are random (nothing is downloaded): right for memory and speed, silent about quality.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Work:
    """One training step's shape. ``cap_gib`` bounds the CUDA allocator from the first allocation
    on.
    """

    name: str
    model: str
    batch_size: int
    sequence_length: int
    quantised: bool = True
    lora_rank: int = 16

    @property
    def tokens(self) -> int:
        return self.batch_size * self.sequence_length


WORKS = {
    work.name: work
    for work in (
        Work("W1", "e2b", 2, 2048),
        Work("W2", "e4b", 2, 2048),
        Work("W3", "e2b", 1, 8192),
        Work("W4", "e2b", 1, 65536),
        Work("W5", "e2b", 1, 2048, quantised=False),
        Work("short", "e2b", 1, 512),
    )
}

ADAPTED = (
    r".*language_model\.layers\.\d+\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
)


def config_of(model: str):
    from transformers import Gemma4Config

    return Gemma4Config.from_dict(json.loads((CONFIGS / f"{model}.json").read_text()))


def build_checkpoint(model: str, directory: str | Path, *, log=print) -> Path:
    """Write random bf16 weights of a real model's shapes as `save_pretrained` does, once; returns
    the folder.
    """
    import torch
    from transformers import Gemma4ForConditionalGeneration

    path = Path(directory) / f"gemma4-{model}-random"
    if (path / "done").exists():
        return path
    start = time.time()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        network = Gemma4ForConditionalGeneration._from_config(
            config_of(model), dtype=torch.bfloat16
        )
    network.save_pretrained(path)
    build_tokenizer(path)
    (path / "done").touch()
    del network
    if device == "cuda":
        torch.cuda.empty_cache()
    log(f"{path.name}: written in {time.time() - start:.0f} s")
    return path


def build_tokenizer(path: Path) -> None:
    """A tokenizer that TRL accepts; the data is token ids already, so its vocabulary does not
    matter.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    ).save_pretrained(path)


def random_rows(rows: int, length: int, *, vocabulary: int = 250_000, seed: int = 0):
    """A data set of unpadded random token ids."""
    import numpy as np
    from datasets import Dataset

    ids = np.random.default_rng(seed).integers(10, vocabulary, (rows, length))
    return Dataset.from_dict({"input_ids": ids.tolist()})


def train_flops(work: Work) -> float:
    """Arithmetic of one optimizer step that has to be done: frozen linears forward and input
    gradient, adapters, LM head, attention.

    Recomputation is not counted, so that a step that recomputes less has the higher utilisation.
    Attention: exact windows, causal half; backward 2.5 times forward (five products against two).
    """
    text = json.loads((CONFIGS / f"{work.model}.json").read_text())["text_config"]
    hidden, layers, shared = (
        text["hidden_size"],
        text["num_hidden_layers"],
        text["num_kv_shared_layers"],
    )
    heads, rank, length = text["num_attention_heads"], work.lora_rank, work.sequence_length
    linears = adapters = attention = 0.0
    for index, kind in enumerate(text["layer_types"]):
        head = text["head_dim"] if kind == "sliding_attention" else text["global_head_dim"]
        keys = text["num_key_value_heads"]
        reuses = index >= layers - shared
        wide = text["intermediate_size"] * (2 if text["use_double_wide_mlp"] and reuses else 1)
        shapes = [
            (hidden, heads * head),
            (heads * head, hidden),
            (hidden, wide),
            (hidden, wide),
            (wide, hidden),
        ]
        if not reuses:
            shapes += [(hidden, keys * head)] * 2
        linears += sum(a * b for a, b in shapes)
        adapters += sum(rank * (a + b) for a, b in shapes)
        linears += 3 * hidden * text["hidden_size_per_layer_input"]
        window = text["sliding_window"]
        seen = (
            length / 2
            if kind != "sliding_attention" or length <= window
            else window * (1 - window / (2 * length))
        )
        attention += 4 * heads * head * seen
    head = text["vocab_size"] * hidden
    return work.tokens * (4 * linears + 6 * adapters + 4 * head + 3.5 * attention)
