"""The works every stack is measured on, and what they need: checkpoints of real shapes, data,
arithmetic counts.

Weights are random (nothing is downloaded): right for memory and speed, silent about quality.
"""

from __future__ import annotations

import functools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gemma_accel.telemetry import arithmetic, lora_weights

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
        Work("longest", "e2b", 1, 131072),
    )
}

PATCHES, POOLED = 2520, 9  # patches an image is padded to, and patches of a soft token


@dataclass(frozen=True)
class Media:
    """A row of text with images or a sound in it, E2B in NF4, rank 16."""

    text: int
    grids: tuple[tuple[int, int], ...] = ()  # patches across and down
    frames: int = 0  # of ten milliseconds
    tower: str = "vision_tower"

    @property
    def soft_tokens(self) -> int:
        return sum(w * h // POOLED for w, h in self.grids) + -(-self.frames // 4)

    @property
    def tokens(self) -> int:
        """Of the row, the two markers around each medium included."""
        return self.text + self.soft_tokens + 2 * (len(self.grids) + bool(self.frames))


MEDIA_WORKS = {
    "images": Media(512, grids=((60, 42), (42, 60))),
    "photos": Media(512, grids=((57, 42), (42, 57))),
    "sound": Media(256, frames=2999, tower="audio_tower"),
}

ADAPTED = (
    r".*language_model\.layers\.\d+\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
)


@functools.cache
def plan_of(
    work: str, limit: float | None, length: int | None = None, *, float32: bool = False
) -> Any:
    """The plan of a work, or of a text work's model with one row of another length, or loaded in
    float32.
    """
    from gemma_accel.planner import plan

    dtype = "float32" if float32 else "bfloat16"
    if work in MEDIA_WORKS:
        media = MEDIA_WORKS[work]
        return plan(
            CONFIGS / "e2b.json",
            vram_gib=limit,
            batch_size=1,
            sequence_length=media.tokens,
            images=len(media.grids),
            sound_seconds=media.frames / 100,
            dtype=dtype,
        )
    shape = WORKS[work]
    return plan(
        CONFIGS / f"{shape.model}.json",
        vram_gib=limit,
        batch_size=1 if length else shape.batch_size,
        sequence_length=length or shape.sequence_length,
        quantization="nf4" if shape.quantised else None,
        lora_rank=shape.lora_rank,
        dtype=dtype,
    )


def config_of(model: str):
    from transformers import Gemma4Config

    return Gemma4Config.from_dict(json.loads((CONFIGS / f"{model}.json").read_text()))


def nf4():
    """Four bits as QLoRA has them, for every stack the same."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


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
    """Arithmetic of one optimizer step that has to be done: `gemma_accel.telemetry`, whose formula
    is the one of the ``mfu`` in the Trainer's logs.
    """
    text = SimpleNamespace(
        **json.loads((CONFIGS / f"{work.model}.json").read_text())["text_config"]
    )
    cost = arithmetic(text, adapters=lora_weights(text, work.lora_rank))
    return cost.rows(work.batch_size, work.sequence_length)
