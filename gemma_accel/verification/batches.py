"""What goes in: small batches of text, pictures and sounds, with the loss that each is run for."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma_accel.verification.runs import Probe, Run

__all__ = ["make_probes", "modality_of"]


def make_probes(model: Any, base: nn.Module, device: torch.device) -> tuple[list[Probe], list[str]]:
    probes = [_text_probe(model, base, device), _labelled_probe(model, base, device)]
    notes = []
    for name, tower, make in (
        ("vision", "vision_tower", _image_probe),
        ("audio", "audio_tower", _audio_probe),
    ):
        module = getattr(base.model, tower, None)
        if module is None:
            continue
        where = next(module.parameters()).device
        if where != device or getattr(module, "_gemma_accel_parked", None) is not None:
            notes.append(
                f"{name} not looked at: its tower waits on the {where}, unused by this run"
            )
            continue
        probes.append(make(base, device))
    return probes, notes


def modality_of(path: str) -> str:
    """Which probes reach a module."""
    for name in ("vision", "audio"):
        if f"{name}_tower" in path or f"embed_{name}" in path:
            return name
    return "text"


def _tokens(base: nn.Module, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids of plain text tokens [2, length] and their mask: the second row is padded."""
    config: Any = base.config
    text = config.get_text_config()
    tokens = min(
        text.vocab_size, getattr(text, "vocab_size_per_layer_input", None) or text.vocab_size
    )
    special = {
        value
        for owner in (config, text)
        for name, value in vars(owner).items()
        if re.fullmatch(r".*_token_(id|index)", name) and isinstance(value, int)
    }
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(tokens, (2, length), generator=generator)
    while (taken := torch.isin(ids, torch.tensor(sorted(special) or [-1]))).any():
        ids[taken] = torch.randint(tokens, (int(taken.sum()),), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length * 3 // 4 :] = 0
    ids[mask == 0] = text.pad_token_id or 0
    return ids.to(device), mask.to(device)


def _text_probe(model: Any, base: nn.Module, device: torch.device) -> Probe:
    """Beyond the sliding window. Every eighth position's logits: all would be gigabytes."""
    config: Any = base.config
    window = getattr(config.get_text_config(), "sliding_window", None) or 0
    ids, mask = _tokens(base, min(window + 32, 640), device)
    kept = torch.arange(ids.shape[1] % 8, ids.shape[1] - 1, 8, device=device)
    targets = ids[:, kept + 1].masked_fill(mask[:, kept + 1] == 0, -100)

    def forward(run: Run) -> Tensor:
        out = model(input_ids=ids, attention_mask=mask, logits_to_keep=kept, use_cache=False)
        logits = out.logits[targets != -100]
        run.observe("logits", logits)
        return F.cross_entropy(logits.float(), targets[targets != -100])

    return Probe("text", "text", forward, mask.bool())


def _labelled_probe(model: Any, base: nn.Module, device: torch.device) -> Probe:
    """The model's own loss, of few tokens: for the head. The layers have had their text."""
    ids, mask = _tokens(base, 24, device)
    labels = ids.masked_fill(mask == 0, -100)

    def forward(run: Run) -> Tensor:
        out = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
        loss: Tensor = out.loss
        return loss

    return Probe("labels", "text", forward, mask.bool(), shallow=True)


def _image_probe(base: nn.Module, device: torch.device) -> Probe:
    """Two pictures of noise, the second padded, through the tower and its embedder."""
    inner: Any = base.model
    config = inner.config.vision_config
    wide, high = 4 * config.pooling_kernel_size, 3 * config.pooling_kernel_size
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(2, wide * high, 3 * config.patch_size**2, generator=generator).to(device)
    y, x = torch.meshgrid(torch.arange(high), torch.arange(wide), indexing="ij")
    positions = torch.stack((x, y), -1).reshape(1, -1, 2).repeat(2, 1, 1)
    positions[1, wide * (high - config.pooling_kernel_size) :] = -1
    positions = positions.to(device)

    def forward(run: Run) -> Tensor:
        out = inner.get_image_features(pixels, positions).pooler_output
        return _tower_loss(run, out if isinstance(out, Tensor) else torch.cat(tuple(out)))

    return Probe("vision", "vision", forward, (positions >= 0).all(-1))


def _audio_probe(base: nn.Module, device: torch.device) -> Probe:
    """Two sounds of noise, the second padded, through the tower and its embedder."""
    inner: Any = base.model
    # as wide as the first convolution has channels
    bins = inner.audio_tower.config.subsampling_conv_channels[0]
    generator = torch.Generator().manual_seed(2)
    frames = torch.randn(2, 128, bins, generator=generator)
    frames = frames.to(device, next(inner.audio_tower.parameters()).dtype)
    mask = torch.ones(2, 128, dtype=torch.bool, device=device)
    mask[1, 100:] = False

    def forward(run: Run) -> Tensor:
        out = inner.get_audio_features(frames, mask)
        return _tower_loss(run, out.pooler_output[out.attention_mask])

    return Probe("audio", "audio", forward, mask[:, ::2][:, ::2])  # two convolutions of stride 2


def _tower_loss(run: Run, features: Tensor) -> Tensor:
    """A number that every feature moves: the mean of their products with fixed random ones."""
    run.observe("features", features)
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(features.shape, generator=generator).to(features.device)
    return (features.float() * weights).mean() + features.float().square().mean()
