"""Small real images and sounds, made when asked for, and the processor that turns them into a tiny
model's inputs.

Nothing is downloaded: the tokenizer is built here with the tiny configuration's media tokens, the
image processor and the feature extractor from their configurations.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
import types
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.gemma4.modeling_gemma4 import Gemma4ClippableLinear

from tests.tiny import AUDIO, VOCAB, tiny_model

MEDIA_TOKENS = {  # ids as in tests.tiny: the last ones of the vocabulary, downwards
    "image_token": "<|image|>",
    "video_token": "<|video|>",
    "audio_token": "<|audio|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}

RANGES = ("input_min", "input_max", "output_min", "output_max")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<|{{ part['type'] }}|>{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def picture(width: int = 96, height: int = 64, *, seed: int = 0) -> Image.Image:
    """A drawing: a shaded ground, a disc, a line and a word."""
    colours = np.random.default_rng(seed).integers(0, 255, (4, 3)).tolist()
    ground = np.linspace(colours[0], colours[1], width)[None].repeat(height, 0).astype(np.uint8)
    image = Image.fromarray(ground)
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 4, height // 4, 3 * width // 4, 3 * height // 4), fill=tuple(colours[2]))
    draw.line((0, height, width, 0), fill=tuple(colours[3]), width=2)
    draw.text((2, 2), f"no. {seed}", fill=tuple(colours[3]))
    return image


def sound(seconds: float = 0.5, *, pitch: float = 220.0, rate: int = 16_000) -> np.ndarray:
    """A tone that fades in and out, with an overtone and a little noise."""
    t = np.arange(round(seconds * rate)) / rate
    wave = np.sin(2 * math.pi * pitch * t) + 0.3 * np.sin(4 * math.pi * pitch * t)
    wave += 0.01 * np.random.default_rng(round(pitch)).standard_normal(t.shape)
    return (0.5 * wave * np.sin(math.pi * t / max(seconds, 1e-9))).astype(np.float32)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable character, and Gemma 4's special tokens at the tiny configuration's
    ids."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<bos>": 2}
    vocabulary |= {chr(code): 3 + i for i, code in enumerate([*range(32, 127), 10])}
    vocabulary |= {token: VOCAB - 1 - i for i, token in enumerate(MEDIA_TOKENS.values())}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        extra_special_tokens=MEDIA_TOKENS,
    )


def _processor_class() -> type:
    # transformers 5.17 imports torchvision for a function that only its other image processor calls
    stub = importlib.util.find_spec("torchvision") is None and "torchvision" not in sys.modules
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2")
    if stub:
        for name in names:
            sys.modules[name] = types.ModuleType(name)
        functional = types.SimpleNamespace(InterpolationMode=None)
        sys.modules[names[-1]].functional = functional  # type: ignore[attr-defined]
    try:
        from transformers.models.gemma4 import processing_gemma4
    finally:
        if stub:
            for name in names:
                sys.modules.pop(name)

    class ProcessorWithoutVideo(processing_gemma4.Gemma4Processor):
        """The video processor needs torchvision at run time: it is left out."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor" and argument is None:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

        def save_pretrained(self, directory: str, **kwargs: Any) -> list[str]:
            return list(self.tokenizer.save_pretrained(directory))

    return ProcessorWithoutVideo


@functools.cache
def processor() -> Any:
    """Gemma 4's own processor for a tiny model: 4-pixel patches, 3 x 3 of them a soft token, at
    most 70 an image.

    The tower's first projection takes as many mel bins as the first convolution has channels."""
    return _processor_class()(
        feature_extractor=Gemma4AudioFeatureExtractor(
            feature_size=AUDIO["subsampling_conv_channels"][0]
        ),
        image_processor=Gemma4ImageProcessorPil(
            patch_size=4, max_soft_tokens=70, pooling_kernel_size=3
        ),
        tokenizer=tokenizer(),
        video_processor=None,
        chat_template=CHAT_TEMPLATE,
    )


def chat(question: str, answer: str, *, images: int = 0, sounds: int = 0) -> list[dict[str, Any]]:
    """A user's turn with placeholders for media, and the assistant's answer."""
    media = [{"type": "image"} for _ in range(images)] + [{"type": "audio"} for _ in range(sounds)]
    return [
        {"role": "user", "content": [*media, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def clip(model: Any, *, low: float = 0.05, high: float = 0.6, seed: int = 0) -> Any:
    """Give every clipped linear finite ranges that bite: each its own, but one input range for
    projections that share an input."""
    generator = torch.Generator().manual_seed(seed)
    shared: dict[str, Any] = {}
    for path, module in model.named_modules():
        if not isinstance(module, Gemma4ClippableLinear) or not module.use_clipped_linears:
            continue
        parent, _, name = path.rpartition(".")
        ranges = (torch.rand(4, generator=generator) * (high - low) + low) * torch.tensor(
            [-1, 1, -1, 1]
        )
        if name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            ranges[:2] = shared.setdefault(parent, ranges)[:2]
        for buffer, value in zip(RANGES, ranges, strict=True):
            getattr(module, buffer).fill_(value)
    return model


def model(*, clipped: bool = True, **changes: Any) -> Any:
    """A tiny model with both towers, its clipped linears clipping."""
    made = tiny_model("conditional", **changes)
    return clip(made) if clipped else made


def inputs(*, images: int = 0, sounds: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of two rows as the model takes it: media and text, and text alone, with labels."""
    rows = [
        chat("What is it?", "A disc.", images=images, sounds=sounds),
        chat("And then?", "Nothing."),
    ]
    pictures = iter([picture(96 - 20 * i, 60 + 12 * i, seed=seed + i) for i in range(images)])
    tones = iter([sound(0.4 + 0.3 * i, pitch=200.0 + 50 * (seed + i)) for i in range(sounds)])
    for part in rows[0][0]["content"]:
        if part["type"] in ("image", "audio"):
            part[part["type"]] = next(pictures if part["type"] == "image" else tones)
    batch = processor().apply_chat_template(
        rows,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {**batch, "labels": labels}
