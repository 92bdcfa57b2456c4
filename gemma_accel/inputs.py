"""What a model is fed, looked at while it is on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from torch import Tensor

__all__ = ["IGNORED", "CheckedIds"]

IGNORED = -100
"""The label of a token that is not learned."""

_OTHER_TOKENIZER = (
    "The tokenizer is another model's, or has tokens of its own: then "
    "model.resize_token_embeddings(len(tokenizer)) before training."
)


class CheckedIds:
    """A trainer's collator, and a look at the token ids and labels that it makes, while they are on
    the host.

    On the GPU one beyond the vocabulary is a device-side assert that names nothing and ends the
    process, or a wrong loss. Everything else is the collator's own: its attributes, read and set,
    and its class.
    """

    def __init__(self, collator: Callable[..., Any], config: Any, own_loss: bool = False) -> None:
        """``own_loss``: what labels may be is the user's to say."""
        vars(self).update(collator=collator, config=config, own_loss=own_loss)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """
        Raises:
            ValueError: an id of ``input_ids``, or a label that is not -100, is not in the
                vocabulary.
        """
        batch = self.collator(*args, **kwargs)
        if isinstance(batch, Mapping):
            ids, labels = batch.get("input_ids"), batch.get("labels")
            if _on_host(ids):
                self._look(ids, "the token id", _OTHER_TOKENIZER)
            if _on_host(labels) and not self.own_loss and labels.shape == getattr(ids, "shape", ()):
                remedy = f"What is not learned has the label {IGNORED}, padding too."
                self._look(labels.masked_fill(labels == IGNORED, 0), "the label", remedy)
        return batch

    def _look(self, ids: Tensor, what: str, remedy: str) -> None:
        low, high = (end.item() for end in ids.aminmax())
        if low >= 0 and high < self.config.vocab_size:
            return
        wrong = int(low if low < 0 else high)
        row = int((ids == wrong).reshape(len(ids), -1).any(-1).nonzero()[0])
        raise ValueError(
            f"row {row} of a batch has {what} {wrong}; the model's vocabulary has "
            f"{self.config.vocab_size}. {remedy}"
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.collator, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.collator, name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # what TRL asks the collator for
        return type(self.collator)

    def __reduce__(self) -> Any:
        return CheckedIds, (self.collator, self.config, self.own_loss)


def _on_host(ids: Any) -> TypeGuard[Tensor]:
    return isinstance(ids, Tensor) and ids.numel() > 0 and ids.device.type == "cpu"
