"""Small real images and sounds, made when asked for, and the processor that turns them into a tiny
model's inputs.

Nothing is downloaded: the tokenizer is built here with the tiny configuration's media tokens, the
image processor and the feature extractor from their configurations.
"""

from __future__ import annotations

import copy
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


def clip(model: Any, *, seed: int = 0) -> Any:
    """Give every clipped linear ranges that hold a few per cent of what it sees, at either end;
    projections that share an input share its range, as in a calibrated checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, Gemma4ClippableLinear)}
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(name: str) -> Any:
        return lambda module, args, out: seen.__setitem__(name, (args[0].detach(), out.detach()))

    hooks = [m.register_forward_hook(watch(n)) for n, m in linears.items()]
    with torch.no_grad():
        model(**inputs(images=2, sounds=2))
    for hook in hooks:
        hook.remove()
    for name, module in linears.items():
        if not module.use_clipped_linears:
            continue
        for values, ends in zip(seen[name], (RANGES[:2], RANGES[2:]), strict=True):
            share = 0.02 + 0.06 * torch.rand(2, generator=generator)
            if ends == RANGES[:2] and name.rpartition(".")[2][0] in "qkvgu":
                share = torch.tensor([0.04, 0.06])
            sample = values.flatten()[:: max(1, values.numel() // 4096)]
            getattr(module, ends[0]).fill_(sample.quantile(share[0].item()))
            getattr(module, ends[1]).fill_(sample.quantile(1 - share[1].item()))
    return model


def model(*, clipped: bool = True, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny model with both towers, its clipped linears clipping."""
    made = tiny_model("conditional", **changes)
    with torch.no_grad():  # patches that differ by more than their pixels
        made.model.vision_tower.patch_embedder.position_embedding_table.normal_()
        for name, parameter in made.named_parameters():
            if "_tower." in name and parameter.dim() > 1:
                parameter.mul_(4)  # the towers' own initial weights are small
            if name.endswith("per_dim_scale"):
                parameter.normal_()
    return (clip(made) if clipped else made).to(dtype)


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


def tower_gradients(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a tower and its embedder give for a batch's media, and the gradient of every parameter
    for a fixed random direction, by name; the features themselves under "features"."""
    model.zero_grad()
    inner = getattr(model, "get_base_model", lambda: model)().model
    if "pixel_values" in batch:
        out = inner.get_image_features(batch["pixel_values"], batch["image_position_ids"])
        features = torch.cat(list(out.pooler_output))
    else:
        out = inner.get_audio_features(batch["input_features"], batch["input_features_mask"])
        features = out.pooler_output[out.attention_mask]
    direction = torch.randn(features.shape, generator=torch.Generator().manual_seed(7))
    if features.requires_grad:
        (features.float() * direction.to(features.device)).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"features": features.detach(), **grads}


def total_error(got: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Relative errors of everything, in the root of their squares."""
    assert got.keys() == truth.keys() and len(got) > 1
    errors = [
        ((got[n].double() - t.double()).norm() / t.double().norm()).item() for n, t in truth.items()
    ]
    return math.sqrt(sum(error**2 for error in errors))


def block_ratios(
    apply: Any, batch: dict[str, torch.Tensor], blocks: str, dtype: torch.dtype, seed: int
) -> list[float]:
    """Our error over stock's, against float32, in each of the tower's clipped blocks of a class,
    run by itself on what it sees in a whole model: output, input's and every parameter's gradient.

    A whole tower will not do: a value that one rounding moves across a clamp's end turns a gradient
    off, and everything before it follows, in stock as in ours but not alike. Now and then it
    happens in a block too: look at the median.
    """
    seen = model(seed=seed)
    named = {n: m for n, m in seen.named_modules() if type(m).__name__ == blocks}
    calls: dict[str, Any] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: calls.__setitem__(name, (args, kwargs)),
            with_kwargs=True,
        )
        for name, module in named.items()
    ]
    with torch.no_grad():
        seen(**batch)
    for hook in hooks:
        hook.remove()
    rounded = seen.to(dtype)
    models = [copy.deepcopy(rounded).float(), copy.deepcopy(rounded), copy.deepcopy(rounded)]
    apply(models[2])
    ratios = []
    for name, call in calls.items():
        truth, stock, ours = (_run_block(m.get_submodule(name), *call, dtype) for m in models)
        ratios.append(total_error(ours, truth) / total_error(stock, truth))
    assert ratios
    return ratios


def _run_block(module: Any, args: Any, kwargs: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    own = next(module.parameters()).dtype

    def cast(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(cast(v) for v in value)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        return value.detach().to(dtype).to(own)

    args, kwargs = [cast(v) for v in args], {k: cast(v) for k, v in kwargs.items()}
    x = args[0] if args else kwargs["hidden_states"]
    x.requires_grad_()
    out = module(*args, **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    out.backward(direction.to(out.dtype))
    grads = {n: p.grad for n, p in module.named_parameters()}
    return {"out": out.detach(), "dx": x.grad, **{n: g for n, g in grads.items() if g is not None}}
