"""The multimodal collator: TRL's where TRL has one, sounds besides, and no medium lost without a
word."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from gemma_accel.collators import DataCollatorForMultimodalLanguageModeling
from tests import media
from tests.media import chat, picture, sound


def collator(**options):
    return DataCollatorForMultimodalLanguageModeling(media.processor(), **options)


def text_of(ids) -> str:
    return media.processor().tokenizer.decode(ids)


def labelled(batch, row) -> str:
    return text_of(batch["labels"][row][batch["labels"][row] != -100])


IMAGE_ROWS = [
    {"messages": chat("What?", "A disc.", images=2),
     "images": [picture(), picture(50, 80, seed=1)]},
    {"messages": chat("And now a longer question.", "Nothing."), "images": []},
    {"messages": [{"role": "user", "content": "Plain."}, {"role": "assistant", "content": "Yes."}],
     "images": [picture(seed=2)]},
]  # fmt: skip
PROMPT_ROWS = [
    {"prompt": chat("What?", "", images=1)[:1], "completion": chat("", "A disc.")[1:],
     "images": [picture()]},
    {"prompt": chat("A longer one?", "")[:1], "completion": chat("", "No.")[1:], "images": []},
]  # fmt: skip


@pytest.mark.parametrize("rows", [IMAGE_ROWS, PROMPT_ROWS], ids=["messages", "prompt-completion"])
@pytest.mark.parametrize("completion_only", [False, True])
def test_equals_trl_where_trl_has_a_collator(rows, completion_only):
    if completion_only and "messages" in rows[0]:
        pytest.skip("TRL refuses the pair; so do we, below")
    options = dict(completion_only_loss=completion_only)
    trl = DataCollatorForVisionLanguageModeling(media.processor(), **options)
    expected, got = trl(copy.deepcopy(rows)), collator(**options)(rows)
    assert got.keys() == expected.keys()
    for key in expected:
        assert torch.equal(got[key], expected[key].to(got[key].dtype)), key


THINKING = media.CHAT_TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}{{ mood }}")


def test_a_rows_own_words_for_the_chat_template():
    processor = copy.copy(media.processor())
    processor.chat_template = THINKING
    rows = [{**row, "chat_template_kwargs": {"mood": "THINK"}} for row in PROMPT_ROWS]
    expected = DataCollatorForVisionLanguageModeling(processor)(copy.deepcopy(rows))
    got = DataCollatorForMultimodalLanguageModeling(processor)(rows)
    assert torch.equal(got["input_ids"], expected["input_ids"])
    assert text_of(got["input_ids"][0]).startswith("<bos>THINK[user]")
    # where TRL's collator forgets them, its text trainer does not
    rows = [{**IMAGE_ROWS[0], "chat_template_kwargs": {"mood": "THINK"}}, IMAGE_ROWS[1]]
    got = collator(chat_template=THINKING)(rows)
    assert text_of(got["input_ids"][0]).startswith("<bos>THINK[user]")
    assert text_of(got["input_ids"][1]).startswith("<bos>[user]")


def test_rows_with_and_without_media():
    rows = [
        {"messages": chat("Look and listen.", "Yes.", images=1, sounds=2), "images": [picture()],
         "audios": [sound(0.3), sound(1.0)]},
        {"messages": chat("Only text here.", "Quite."), "images": None, "audios": []},
        {"messages": chat("Listen.", "A tone.", sounds=1), "audio": sound(0.6)},
    ]  # fmt: skip
    batch = collator()(rows)
    processor = media.processor()
    assert batch["pixel_values"].shape[0] == 1 and batch["input_features"].shape[0] == 3
    for kind, mask in (("image", 1), ("audio", 3)):
        tokens = batch["input_ids"] == getattr(processor, f"{kind}_token_id")
        assert torch.equal(tokens, batch["mm_token_type_ids"] == mask)
        assert (tokens.sum(-1) > 0).tolist() == [True, False, kind == "audio"]
    # as many sound tokens as the tower keeps: the mask, halved twice
    kept = batch["input_features_mask"][:, ::2][:, ::2].sum()
    assert (batch["input_ids"] == processor.audio_token_id).sum() == kept
    assert (batch["input_features"][~batch["input_features_mask"]] == 0).all()
    # padding is on the right, unlabelled and unattended
    padding = batch["attention_mask"] == 0
    assert (batch["input_ids"][padding] == 0).all() and (batch["labels"][padding] == -100).all()
    assert torch.equal(batch["labels"][~padding], batch["input_ids"][~padding])
    # a batch and its rows alone say the same
    alone = collator()(rows[2:])
    assert torch.equal(
        alone["input_features"][0], batch["input_features"][2, : alone["input_features"].shape[1]]
    )


def test_a_batch_of_text_alone():
    batch = collator()([{"messages": chat("Hello?", "Hello.")}, {"text": "Plain text."}])
    assert batch.keys() == {"input_ids", "attention_mask", "labels", "mm_token_type_ids"}
    assert text_of(batch["input_ids"][0]).startswith("<bos>[user]Hello?[assistant]Hello.<eos>")


def test_rows_are_left_as_they_were():
    rows = [{"messages": chat("What?", "A disc.", images=1), "image": picture()}]
    before = copy.deepcopy(rows[0]["messages"])
    assert (collator()(rows)["input_ids"] == media.processor().image_token_id).any()
    assert rows[0]["messages"] == before and "image" in rows[0]


@pytest.mark.parametrize("completion_only", [None, True, False])
def test_what_becomes_a_label(completion_only):
    row = {
        "prompt": chat("Listen.", "", sounds=1)[:1],
        "completion": chat("", "A tone.")[1:],
        "audio": sound(),
    }
    batch = collator(completion_only_loss=completion_only)([row])
    whole = text_of(batch["input_ids"][0])
    assert whole.endswith("[assistant]A tone.<eos>") and "<|audio|>" in whole
    assert labelled(batch, 0) == (whole if completion_only is False else "A tone.<eos>")


def test_prompt_and_completion_as_text():
    batch = collator()([{"prompt": "Hear <|audio|>: ", "completion": "a tone", "audio": sound()}])
    assert labelled(batch, 0) == "a tone"


GENERATION = media.CHAT_TEMPLATE.replace(
    "{% for part in message['content'] %}",
    "{% for part in message['content'] %}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ part['text'] }}{% endgeneration %}{% else %}",
).replace("{% endfor %}{% endif %}{% if message", "{% endif %}{% endfor %}{% endif %}{% if message")


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="needs transformers 5.18"
)
def test_assistant_only_loss():
    rows = [
        {"messages": [*chat("Listen.", "A tone.", sounds=1), *chat("And?", "No more.")],
         "audio": sound()},
        {"messages": chat("What?", "A disc.", images=1), "images": [picture()]},
    ]  # fmt: skip
    batch = collator(assistant_only_loss=True, chat_template=GENERATION)(rows)
    assert [labelled(batch, row) for row in (0, 1)] == ["A tone.No more.", "A disc."]
    assert batch["input_features"].shape[0] == batch["pixel_values"].shape[0] == 1
    with pytest.raises(ValueError, match="needs rows with 'messages'"):
        collator(assistant_only_loss=True)(PROMPT_ROWS)


@pytest.mark.skipif(Version(transformers.__version__) >= Version("5.18"), reason="5.18 can")
def test_assistant_only_loss_is_refused_before_5_18():
    with pytest.raises(ValueError, match=r"needs transformers 5\.18"):
        collator(assistant_only_loss=True)


def test_media_in_the_messages_and_in_columns():
    first, second = picture(), picture(50, 80, seed=1)
    messages = chat("Compare.", "Different.", images=2)
    messages[0]["content"][0]["image"] = first
    got = collator()([{"messages": messages, "images": [second]}])
    plain = [{"role": "user", "content": "Compare."}, messages[1]]
    want = collator()([{"messages": plain, "images": [first, second]}])
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in got)


def test_parts_padded_with_none_by_a_dataset():
    from datasets import Dataset

    rows = Dataset.from_list(
        [
            {"messages": chat("Listen.", "A tone.", sounds=1), "audio": sound(0.3).tolist()},
            {"messages": chat("Nothing?", "Nothing."), "audio": None},
        ]
    )
    assert "text" in rows[0]["messages"][0]["content"][0]  # None, that is
    batch = collator()([rows[0], rows[1]])
    assert batch["input_features"].shape[0] == 1


def test_sounds_in_every_shape():
    wave = sound(0.3)
    shapes = [
        wave,
        wave.tolist(),
        torch.from_numpy(wave),
        [wave],
        {"array": wave, "sampling_rate": 16_000},
    ]
    batches = [collator()([{"text": "<|audio|>", "audio": shape}]) for shape in shapes]
    assert all(torch.equal(b["input_features"], batches[0]["input_features"]) for b in batches)


@pytest.mark.parametrize("dtype", [np.int16, np.int32])
def test_integer_samples_are_taken_at_their_full_scale(dtype):
    wave = sound(0.3)
    whole = (wave * np.iinfo(dtype).max).astype(dtype)
    got, want = (collator()([{"text": "<|audio|>", "audio": w}]) for w in (whole, wave))
    # the quietest of log mel bins hear an int16's last bit
    assert (got["input_features"] - want["input_features"]).abs().mean() < 1e-2


def test_pads_to_a_multiple():
    batch = collator(pad_to_multiple_of=64)([{"text": "short"}])
    assert batch["input_ids"].shape == (1, 64) and batch["attention_mask"].sum() == 5


def test_max_length_cuts_text_but_no_medium():
    row = {"messages": chat("What is it? " * 5, "A disc.", images=1), "images": [picture()]}
    whole = collator()([row])["input_ids"]
    tokens = (whole[0] == media.processor().image_token_id).nonzero()
    end = int(tokens[-1]) + 1
    cut = collator(max_length=end)([row])
    assert torch.equal(cut["input_ids"], whole[:, :end]) and cut["labels"].shape == (1, end)
    with pytest.raises(
        ValueError, match=rf"row 1 .*max_length={end - 1} would cut image 0 \(tokens \d+ to {end}\)"
    ):
        collator(max_length=end - 1)([{"text": "fine"}, row])


def test_a_sound_at_the_limit_is_whole():
    batch = collator()([{"text": "<|audio|>", "audio": np.zeros(480_000, np.float32)}])
    assert (batch["input_ids"] == media.processor().audio_token_id).sum() == 750


WRONG = {
    "too few images": (
        {"messages": chat("?", "!", images=2), "images": [picture()]},
        "more image placeholders than it has images",
    ),
    "too many images": (
        {"messages": chat("?", "!", images=1), "images": [picture(), picture()]},
        r"2 image\(s\) for 1 placeholder",
    ),
    "a sound nobody mentions": (
        {"text": "hello", "audio": sound()},
        r"0 <\|audio\|> placeholder\(s\) for 1 audio",
    ),
    "a placeholder without sound": (
        {"messages": chat("?", "!", sounds=1)},
        "more audio placeholders than it has audios",
    ),
    "a placeholder in the user's words": (
        {"messages": chat("<|audio|>?", "!", sounds=1), "audio": sound()},
        r"2 <\|audio\|> placeholder\(s\) for 1 audio",
    ),
    "another rate": (
        {"text": "<|audio|>", "audio": {"array": sound(), "sampling_rate": 44_100}},
        r"sampled at 44100 Hz.*cast_column",
    ),
    "not decoded": (
        {"text": "<|audio|>", "audio": {"bytes": b"RIFF", "path": None}},
        r"audio 0 is not decoded: it has bytes, path.*cast_column",
    ),
    "decoded to nothing": (
        {"text": "<|audio|>", "audio": {"array": None, "sampling_rate": 16_000}},
        "audio 0 is not decoded",
    ),
    "no sound at all": ({"text": "<|audio|>", "audio": [object()]}, "0 is of type object: expect"),
    "two channels": (
        {"text": "<|audio|>", "audio": np.zeros((2, 8000))},
        r"one channel.*\(2, 8000\)",
    ),
    "samples of no known scale": (
        {"text": "<|audio|>", "audio": (sound() * 32767).astype(int).tolist()},
        r"audio 0 holds int64 samples.*Divide it",
    ),
    "too long": (
        {"text": "<|audio|>", "audio": np.zeros(480_001)},
        "lasts 30.0 s; the model takes at most 30 s",
    ),
    "too short": ({"text": "<|audio|>", "audio": sound(0.005)}, "too short"),
    "two columns": (
        {"text": "<|image|>", "image": picture(), "images": [picture()]},
        "both 'image' and 'images'",
    ),
    "a video": ({"text": "hello", "videos": ["clip.mp4"]}, "'videos', which this collator"),
    "media in the completion": (
        {"prompt": chat("?", "")[:1], "completion": [
            {"role": "assistant", "content": [{"type": "image", "image": picture()}]}]},
        "its completion holds media",
    ),
    "no text": ({"image": picture()}, "expected 'messages', 'text', or 'prompt'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_the_wrong_row_is_named(case):
    row, message = WRONG[case]
    with pytest.raises(ValueError, match=rf"(?s)row 1 of the batch.*{message}"):
        collator()([{"text": "fine"}, row])


def test_completion_only_loss_needs_completions():
    with pytest.raises(ValueError, match="needs rows with 'prompt' and 'completion'"):
        collator(completion_only_loss=True)([{"text": "fine"}])
