"""TRL 1.15 folds its LM head's tiles in Triton alone, where TRL 1.16 has torch for the CPU: this is
1.15's for a machine without a card.
"""

from __future__ import annotations

import torch
import trl.trainer.utils
from trl.kernels import chunked_logprob


class TorchLogProb:
    @staticmethod
    def apply(hidden, weight, bias, labels, temperature, chunk, softcap, scale, outputs):
        logits = hidden @ weight.t() if bias is None else hidden @ weight.t() + bias
        logits = logits * (1.0 if scale is None else scale)
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        log_probs = (logits / temperature).log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        chosen = log_probs.gather(-1, labels[:, None])[:, 0]
        return chosen, entropy, None, logits.detach().mean(-1), log_probs.argmax(-1) == labels


def install(set_attribute=setattr) -> None:
    """Where it is needed."""
    if not hasattr(chunked_logprob, "_use_triton") and not torch.cuda.is_available():
        set_attribute(trl.trainer.utils, "_ChunkedLogProbFunction", TorchLogProb)
