"""Gemma 4 in miniature: every architectural branch of E2B (per-layer embeddings, shared keys and
values, double-wide MLP in the sharing layers, sliding and full layers with their own head widths,
partial rotation) in a few hundred thousand parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
)

VOCAB = 160

LANGUAGE = (
    r".*(language_model|model)\.layers\..*\."
    r"(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
)
"""The language model's linear layers, as a LoRA target."""

TEXT = dict(
    vocab_size=VOCAB,
    vocab_size_per_layer_input=VOCAB,
    hidden_size=64,
    hidden_size_per_layer_input=16,
    intermediate_size=128,
    num_hidden_layers=5,
    layer_types=[
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "sliding_attention",
        "full_attention",
    ],
    num_attention_heads=4,
    num_key_value_heads=2,
    num_global_key_value_heads=None,
    head_dim=16,
    global_head_dim=32,
    num_kv_shared_layers=2,
    use_double_wide_mlp=True,
    attention_k_eq_v=False,
    use_bidirectional_attention=None,
    sliding_window=8,
    max_position_embeddings=512,
    hidden_activation="gelu_pytorch_tanh",
    rms_norm_eps=1e-6,
    attention_bias=False,
    attention_dropout=0.0,
    final_logit_softcapping=30.0,
    enable_moe_block=False,
    num_experts=None,
    top_k_experts=None,
    moe_intermediate_size=None,
    tie_word_embeddings=True,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
    initializer_range=0.05,
    rope_parameters={
        "full_attention": {
            "rope_theta": 1e6,
            "rope_type": "proportional",
            "partial_rotary_factor": 0.25,
        },
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    },
)

VISION = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    pooling_kernel_size=3,
    patch_size=4,
    position_embedding_size=64,
    use_clipped_linears=True,
    standardize=False,
)

AUDIO = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    output_proj_dims=48,
    subsampling_conv_channels=[8, 4],
)


def text_config(**changes: Any) -> Gemma4TextConfig:
    return Gemma4TextConfig(**{**TEXT, **changes})


def full_config(*, towers: bool = True, **changes: Any) -> Gemma4Config:
    config = Gemma4Config(
        text_config={**TEXT, **changes},
        vision_config=VISION if towers else None,
        audio_config=AUDIO if towers else None,
        image_token_id=VOCAB - 1,
        video_token_id=VOCAB - 2,
        audio_token_id=VOCAB - 3,
        boi_token_id=VOCAB - 4,
        eoi_token_id=VOCAB - 5,
        boa_token_id=VOCAB - 6,
        eoa_token_index=VOCAB - 7,
        tie_word_embeddings=True,
    )
    return config


def tiny_model(
    kind: str = "causal",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    towers: bool = True,
    **changes: Any,
) -> Any:
    """A tiny random model: ``causal`` (`Gemma4ForCausalLM`) or ``conditional``
    (`Gemma4ForConditionalGeneration`), in train mode.

    Norm weights and layer scalars are drawn too: their defaults of 1 would hide a kernel that
    ignores them.
    """
    torch.manual_seed(seed)
    if kind == "causal":
        model = Gemma4ForCausalLM(text_config(**changes))
    else:
        model = Gemma4ForConditionalGeneration(full_config(towers=towers, **changes))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
        for name, tensor in model.named_buffers():
            if name.endswith("layer_scalar"):
                tensor.uniform_(0.5, 1.0)
    return model.to(dtype).train()


def batch(
    lengths: tuple[int, ...] = (23, 17), *, seed: int = 0, side: str = "right"
) -> dict[str, torch.Tensor]:
    """Random token ids, padded to the longest, with labels; no media tokens among them."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(longest - length, longest)
        ids[row, where] = torch.randint(3, VOCAB - 10, (length,), generator=generator)
        mask[row, where] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
