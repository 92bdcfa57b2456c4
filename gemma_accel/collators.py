"""A collator for rows with images, sounds, both or neither.

TRL's `DataCollatorForVisionLanguageModeling` knows images; for sounds there is none. This one
follows it in the rows it takes, in what becomes a label and in where it pads, and adds sounds.
Media are never dropped or cut: a row whose media do not fit its text, or would not survive
``max_length``, is an error that names the row.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers.data.data_collator import DataCollatorMixin
from trl.data_utils import apply_chat_template, is_conversational

__all__ = ["DataCollatorForMultimodalLanguageModeling"]

_IGNORED = -100
_COLUMNS = {"image": ("image", "images"), "audio": ("audio", "audios")}
_UNHANDLED = ("video", "videos")
_PCM = (np.int16, np.int32)  # integer samples whose full scale is their dtype's range


class _Row(NamedTuple):
    """One row, encoded."""

    tokens: dict[str, Tensor]  # [T] each: ids, token types, which of them are labels
    media: dict[str, Tensor]  # [media, ...]
    runs: list[tuple[str, int, int]]  # (image 0, first token, one past its last)


@dataclass
class DataCollatorForMultimodalLanguageModeling(DataCollatorMixin):
    """Makes batches of rows that may hold images and sounds, for `SFTTrainer` and Gemma 4.

    A row is what TRL's vision collator takes, ``messages`` or a text column (language modeling) or
    ``prompt`` and ``completion``, with any of:

    - ``images``, a list, or ``image``, one;
    - ``audios``, a list, or ``audio``, one or a list: 1-D arrays at the feature extractor's
      sampling rate (floats in [-1, 1], or PCM in int16 or int32), dictionaries with ``array`` and
      ``sampling_rate`` (as `datasets.Audio` decodes), or paths;
    - ``chat_template_kwargs``, a dictionary for the chat template, as TRL's own rows have it.

    A missing column, None and an empty list all mean none, so a batch may mix rows with and without
    media. Where a message already has content parts, its ``{"type": "image"}`` and
    ``{"type": "audio"}`` parts say where the media go; plain strings get them before the first user
    message, images first.

    The trainer must leave the rows alone: ``SFTConfig(remove_unused_columns=False,
    dataset_kwargs={"skip_prepare_dataset": True})``.

    Args:
        processor: a `Gemma4Processor`.
        max_length: tokens that a row is cut to, from its end; None for no limit. A row whose media
            would be cut is an error.
        completion_only_loss: whether a prompt's tokens are no labels. Default: yes for rows with
            ``prompt`` and ``completion``, as `SFTConfig` has it.
        pad_to_multiple_of: pad the batch to a multiple of this many tokens.
        dataset_text_field: the text column of rows without messages.
        assistant_only_loss: whether only the assistant's turns are labels; needs transformers 5.18
            and a chat template with ``{% generation %}`` markers.
        chat_template: in place of the processor's own.

    Raises (when called):
        ValueError: a row's media do not match its placeholders, cannot be taken whole, or would be
            cut. The message names the row.
    """

    processor: Any
    max_length: int | None = None
    completion_only_loss: bool | None = None
    pad_to_multiple_of: int | None = None
    dataset_text_field: str = "text"
    assistant_only_loss: bool = False
    chat_template: str | None = None
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        if self.assistant_only_loss and Version(transformers.__version__) < Version("5.18.0.dev0"):
            raise ValueError(
                "assistant_only_loss=True needs transformers 5.18 to find the assistant's tokens "
                f"among media, got {transformers.__version__}. Upgrade it, or use rows with "
                "'prompt' and 'completion'."
            )

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [self._named(index, example) for index, example in enumerate(examples)]
        return {**self._pad(rows), **self._stack(rows)}

    def _named(self, index: int, example: Mapping[str, Any]) -> _Row:
        try:
            return self._checked(self._row(example))
        except (ValueError, TypeError, KeyError) as error:
            columns = ("messages", "prompt", self.dataset_text_field)
            text = str(next((example[name] for name in columns if name in example), ""))
            reason = error.args[0] if isinstance(error, KeyError) and error.args else error
            raise ValueError(f"row {index} of the batch ({text[:120]!r}): {reason}") from error

    # -- one row --

    def _row(self, example: Mapping[str, Any]) -> _Row:
        for name in _UNHANDLED:
            if example.get(name) is not None and len(example[name]):
                raise ValueError(
                    f"it has {name!r}, which this collator does not handle. Leave the column out."
                )
        images = _listed(example, "image")
        sounds = [self._waveform(sound, i) for i, sound in enumerate(_listed(example, "audio"))]
        # a data set whose rows differ has None where a row lacks a column
        has = {name for name, value in example.items() if value is not None}
        if has & {"messages", self.dataset_text_field}:
            if self.completion_only_loss:
                raise ValueError(
                    "completion_only_loss=True needs rows with 'prompt' and 'completion'"
                )
            return self._language_modeling(example, images, sounds)
        if self.assistant_only_loss:
            raise ValueError("assistant_only_loss=True needs rows with 'messages'")
        if {"prompt", "completion"} <= has:
            return self._prompt_completion(example, images, sounds)
        raise KeyError(
            f"expected 'messages', {self.dataset_text_field!r}, or 'prompt' and 'completion', "
            f"got {sorted(example)}. "
            "SFTConfig(remove_unused_columns=False) keeps the columns."
        )

    def _language_modeling(
        self, example: Mapping[str, Any], images: list[Any], sounds: list[Any]
    ) -> _Row:
        if example.get("messages") is None:
            row = self._encode(example[self.dataset_text_field], images, sounds)
        else:
            messages, images, sounds = _with_media(
                example["messages"], images, sounds, self._waveform
            )
            if self.assistant_only_loss:
                return self._encode_assistant(messages, **self._template(example))
            rendered = apply_chat_template(
                {"messages": messages}, self.processor, **self._template(example)
            )
            row = self._encode(rendered["text"], images, sounds)
        row.tokens["labelled"] = torch.ones_like(row.tokens["input_ids"], dtype=torch.bool)
        return row

    def _prompt_completion(
        self, example: Mapping[str, Any], images: list[Any], sounds: list[Any]
    ) -> _Row:
        prompt, completion = example["prompt"], example["completion"]
        if is_conversational({"prompt": prompt}):
            prompt, images, sounds = _with_media(prompt, images, sounds, self._waveform)
            completion, *more = _with_media(completion, [], [], self._waveform)
            if any(more):
                raise ValueError("its completion holds media; they belong into the prompt")
            rendered = apply_chat_template(
                {"prompt": prompt, "completion": completion},
                self.processor,
                **self._template(example),
            )
            prompt, completion = rendered["prompt"], rendered["completion"]
        row, end = self._encode(prompt, images, sounds), self._encode(completion, [], [])
        tokens = {name: torch.cat((row.tokens[name], end.tokens[name])) for name in row.tokens}
        labelled = torch.ones_like(tokens["input_ids"], dtype=torch.bool)
        if self.completion_only_loss is not False:
            labelled[: len(row.tokens["input_ids"])] = False
        return _Row({**tokens, "labelled": labelled}, row.media, row.runs)

    def _encode(self, text: str, images: list[Any], sounds: list[Any]) -> _Row:
        for kind, media in (("image", images), ("audio", sounds)):
            token = getattr(self.processor, f"{kind}_token")
            if (count := text.count(token)) != len(media):
                raise ValueError(
                    f"its text has {count} {token} placeholder(s) for {len(media)} {kind}(s). "
                    "There must be one for each."
                )
        return self._split(
            self.processor(
                text=[text],
                images=[images] if images else None,
                audio=sounds or None,
                return_tensors="pt",
                **self._processing(),
            )
        )

    def _encode_assistant(self, messages: list[Any], **template: Any) -> _Row:
        """The chat template's own way: it alone knows which tokens the assistant wrote."""
        batch = self.processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs=self._processing(),
            **template,
        )
        mask = torch.as_tensor(batch.pop("assistant_masks"))[0] != 0
        row = self._split(batch)
        row.tokens["labelled"] = mask
        return row

    def _template(self, example: Mapping[str, Any]) -> dict[str, Any]:
        chosen = {} if self.chat_template is None else {"chat_template": self.chat_template}
        return {**chosen, **(example.get("chat_template_kwargs") or {})}

    @staticmethod
    def _processing() -> dict[str, Any]:
        # the chat template has put the BOS token already; sounds are not to be cut at the
        # extractor's default length
        return {
            "add_special_tokens": False,
            "text_kwargs": {"padding": False, "truncation": False},
            "audio_kwargs": {"padding": "longest", "truncation": False, "max_length": None},
        }

    def _split(self, batch: Mapping[str, Tensor]) -> _Row:
        """What the processor made of one row, as tokens and media."""
        media = {k: v for k, v in batch.items() if k in _MEDIA_KEYS}
        names = [k for k in ("input_ids", "mm_token_type_ids") if k in batch]
        tokens = {k: torch.as_tensor(batch[k])[0] for k in names}
        return _Row(tokens, media, self._runs(tokens["input_ids"], media))

    def _runs(self, ids: Tensor, media: dict[str, Tensor]) -> list[tuple[str, int, int]]:
        """Where each medium's soft tokens lie; there must be as many as the tower will give."""
        runs = []
        kinds = {"image": self._image_tokens(media), "audio": self._audio_tokens(media)}
        for kind, counts in kinds.items():
            token = getattr(self.processor, f"{kind}_token_id")
            where = (ids == token).nonzero().flatten().tolist()
            if len(where) != sum(counts):
                raise ValueError(
                    f"its text holds {len(where)} {kind} tokens, "
                    f"its {kind}(s) make {' + '.join(map(str, counts)) or 0}"
                )
            for number, count in enumerate(counts):
                if count == 0:
                    raise ValueError(
                        f"{kind} {number} is too short: it makes no token and would be lost"
                    )
                run, where = where[:count], where[count:]
                runs.append((f"{kind} {number}", run[0], run[-1] + 1))
        return runs

    def _image_tokens(self, media: dict[str, Tensor]) -> list[int]:
        if "image_position_ids" not in media:
            return []
        patches = (media["image_position_ids"] != -1).all(-1).sum(-1)
        return (patches // self.processor.image_processor.pooling_kernel_size**2).tolist()

    @staticmethod
    def _audio_tokens(media: dict[str, Tensor]) -> list[int]:
        if "input_features_mask" not in media:
            return []
        # two convolutions of stride 2
        return media["input_features_mask"][:, ::2][:, ::2].sum(-1).tolist()

    def _waveform(self, sound: Any, number: int = 0) -> np.ndarray:
        """A sound as one channel of samples at the extractor's rate, whole."""
        extractor = self.processor.feature_extractor
        if isinstance(sound, str | os.PathLike):
            from transformers.audio_utils import load_audio

            sound = load_audio(os.fspath(sound), sampling_rate=extractor.sampling_rate)
        elif isinstance(sound, Mapping) and sound.get("array") is None:
            raise ValueError(
                f"audio {number} is not decoded: it has {', '.join(map(str, sound))}. Cast the "
                f"column: dataset.cast_column('audio', "
                f"datasets.Audio(sampling_rate={extractor.sampling_rate})), or give the files' "
                "paths."
            )
        elif isinstance(sound, Mapping) or hasattr(sound, "get_all_samples"):
            rate, sound = sound["sampling_rate"], sound["array"]
            if rate != (wanted := extractor.sampling_rate):
                raise ValueError(
                    f"audio {number} is sampled at {rate} Hz, the feature extractor takes "
                    f"{wanted}. Cast the column: dataset.cast_column('audio', "
                    f"datasets.Audio(sampling_rate={wanted}))."
                )
        wave = np.asarray(sound)
        if wave.dtype.hasobject:
            raise ValueError(
                f"audio {number} is of type {type(sound).__name__}: expected a path, an array of "
                "samples, or a row of datasets.Audio."
            )
        if wave.dtype in _PCM:
            wave = wave / np.float32(-np.iinfo(wave.dtype).min)
        elif not np.issubdtype(wave.dtype, np.floating):
            raise ValueError(
                f"audio {number} holds {wave.dtype} samples, whose full scale is not known: "
                "expected floats in [-1, 1], or int16 or int32 arrays of PCM. Divide it by its "
                "full scale."
            )
        wave = wave.astype(np.float32)
        if wave.ndim != 1:
            raise ValueError(
                f"audio {number} must be one channel of samples, got an array of shape "
                f"{wave.shape}. Average its channels."
            )
        limit = self.processor.audio_seq_length * self.processor.audio_ms_per_token / 1000
        if (seconds := len(wave) / extractor.sampling_rate) > limit:
            raise ValueError(
                f"audio {number} lasts {seconds:.1f} s; the model takes at most {limit:g} s, "
                "and the rest would be lost. Split it."
            )
        return wave

    def _checked(self, row: _Row) -> _Row:
        """Cut to ``max_length``, which must not touch a medium."""
        length, limit = len(row.tokens["input_ids"]), self.max_length
        if limit is None or length <= limit:
            return row
        lost = [run for run in row.runs if run[2] > limit]
        if cut := [f"{name} (tokens {begin} to {end})" for name, begin, end in lost]:
            raise ValueError(
                f"it has {length} tokens, and max_length={limit} would cut {', '.join(cut)}. "
                "Raise max_length (None: no limit), or put the media before the long text."
            )
        return row._replace(tokens={name: t[:limit] for name, t in row.tokens.items()})

    # -- the batch --

    def _pad(self, rows: Sequence[_Row]) -> dict[str, Tensor]:
        longest = max(len(row.tokens["input_ids"]) for row in rows)
        if multiple := self.pad_to_multiple_of:
            longest = -(-longest // multiple) * multiple
        pad = self.processor.tokenizer.pad_token_id
        if pad is None:
            raise ValueError(
                "the processor's tokenizer has no pad_token_id. Set tokenizer.pad_token."
            )

        def padded(get: Callable[[_Row], Tensor], value: int) -> Tensor:
            out = torch.full((len(rows), longest), value, dtype=torch.long)
            for line, row in zip(out, rows, strict=True):
                line[: len(row.tokens["input_ids"])] = get(row)
            return out

        batch = {
            "input_ids": padded(lambda row: row.tokens["input_ids"], pad),
            "attention_mask": padded(lambda row: torch.ones_like(row.tokens["input_ids"]), 0),
            "labels": padded(_labels, _IGNORED),
        }
        if all("mm_token_type_ids" in row.tokens for row in rows):
            batch["mm_token_type_ids"] = padded(lambda row: row.tokens["mm_token_type_ids"], 0)
        return batch

    @staticmethod
    def _stack(rows: Sequence[_Row]) -> dict[str, Tensor]:
        """The media of all rows, in order; sounds as long as the longest."""
        batch = {}
        for key in _MEDIA_KEYS:
            parts = [row.media[key] for row in rows if key in row.media]
            if not parts:
                continue
            longest = max(part.shape[1] for part in parts)
            batch[key] = torch.cat([_lengthened(part, longest, _MEDIA_KEYS[key]) for part in parts])
        return batch


# what a tower takes, and what stands for nothing in it
_MEDIA_KEYS = {
    "pixel_values": 0,
    "image_position_ids": -1,
    "input_features": 0,
    "input_features_mask": False,
}


def _labels(row: _Row) -> Tensor:
    return row.tokens["input_ids"].masked_fill(~row.tokens["labelled"], _IGNORED)


def _lengthened(x: Tensor, length: int, value: Any) -> Tensor:
    if x.shape[1] == length:
        return x
    out = x.new_full((x.shape[0], length, *x.shape[2:]), value)
    out[:, : x.shape[1]] = x
    return out


def _listed(example: Mapping[str, Any], kind: str) -> list[Any]:
    """A row's images or sounds, whichever column they are in."""
    one, several = _COLUMNS[kind]
    given = [name for name in (one, several) if example.get(name) is not None]
    if len(given) > 1:
        raise ValueError(f"it has both {one!r} and {several!r}. Keep one of the columns.")
    if not given:
        return []
    value = example[given[0]]
    if given[0] == several:
        return list(value)
    # a list in the column for one is a list of them, unless it is a waveform as a list of numbers
    is_list = isinstance(value, (list, tuple)) and not (
        value and isinstance(value[0], (int, float))
    )
    return list(value) if is_list else [value]


def _with_media(
    messages: Sequence[Any],
    images: Sequence[Any],
    sounds: Sequence[Any],
    waveform: Callable[..., Any],
) -> tuple[list[Any], list[Any], list[Any]]:
    """Messages in content parts, every medium in its place, and all media in the text's order."""
    waiting = {"image": list(images), "audio": list(sounds)}
    counts = {kind: len(media) for kind, media in waiting.items()}
    placed: dict[str, list[Any]] = {"image": [], "audio": []}
    structured = _structured(messages, counts)
    for message in structured:
        for part in message.get("content") or ():
            _place(part, waiting, placed, waveform)
    for kind, left in waiting.items():
        if left:
            raise ValueError(
                f"it has {counts[kind]} {kind}(s) for {counts[kind] - len(left)} placeholder(s) "
                "in its messages. There must be one for each."
            )
    return structured, placed["image"], placed["audio"]


def _structured(messages: Sequence[Any], counts: Mapping[str, int]) -> list[Any]:
    """Copies of the messages with their contents as lists of parts. Media that no part has a place
    for are given one before the first user message that is a plain string."""
    parts = [
        p for m in messages if not isinstance(m.get("content"), str) for p in m.get("content") or ()
    ]
    named = {part.get("type") for part in parts}
    missing = [{"type": kind} for kind, n in counts.items() if kind not in named for _ in range(n)]
    structured = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            first = missing if message["role"] == "user" else []
            missing = [] if first else missing
            content = [*first, {"type": "text", "text": content}]
        if content is not None:
            message = {**message, "content": [dict(part) for part in content]}
        structured.append(message)
    return structured


def _place(
    part: dict[str, Any], waiting: dict[str, list[Any]], placed: dict[str, list[Any]], waveform: Any
) -> None:
    """Fill one content part, if it is a placeholder, and note its medium."""
    for key in [key for key, value in part.items() if value is None]:
        del part[key]  # a dataset gives every part every part's keys
    kind = part.get("type")
    if kind not in waiting:
        return
    if kind in part:
        medium = part[kind] if kind == "image" else waveform(part[kind], len(placed[kind]))
    elif source := next((part[k] for k in ("url", "path") if k in part), None):
        medium = source if kind == "image" else waveform(source, len(placed[kind]))
    elif waiting[kind]:
        medium = waiting[kind].pop(0)
    else:
        raise ValueError(
            f"its messages have more {kind} placeholders than it has {kind}s. "
            f"There must be one {kind} for each."
        )
    part[kind] = medium
    placed[kind].append(medium)
