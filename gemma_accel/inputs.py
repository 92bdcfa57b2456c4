"""What a model is fed, looked at while it is on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["CheckedIds"]


class CheckedIds:
    """A trainer's collator, and a look at the token ids that it makes, while they are on the host.

    On the GPU an id beyond the vocabulary is a device-side assert that names nothing and ends the
    process. Everything else is the collator's own: its attributes, read and set, and its class.
    """

    def __init__(self, collator: Callable[..., Any], config: Any) -> None:
        vars(self).update(collator=collator, config=config)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """
        Raises:
            ValueError: an id of ``input_ids`` is not in the vocabulary.
        """
        batch = self.collator(*args, **kwargs)
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if isinstance(ids, Tensor) and ids.numel() and ids.device.type == "cpu":
            low, high = (end.item() for end in ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                self._complain(ids, int(low if low < 0 else high))
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.collator, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.collator, name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # what TRL asks the collator for
        return type(self.collator)

    def __reduce__(self) -> Any:
        return CheckedIds, (self.collator, self.config)

    def _complain(self, ids: Tensor, wrong: int) -> None:
        row = int((ids == wrong).reshape(len(ids), -1).any(-1).nonzero()[0])
        raise ValueError(
            f"row {row} of a batch has the token id {wrong}; the model's vocabulary has "
            f"{self.config.vocab_size}. The tokenizer is another model's, or has tokens of its "
            "own: then model.resize_token_embeddings(len(tokenizer)) before training."
        )
