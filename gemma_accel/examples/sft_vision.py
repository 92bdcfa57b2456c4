"""Fine-tune Gemma 4 on images with TRL: a stock script, and one line.

    python sft_vision.py --model google/gemma-4-E2B-it --dataset pictures.jsonl --load-in-4bit

The one line is `import gemma_accel.auto`. The dataset is a hub id or a .jsonl file: rows as TRL's
vision trainer takes them, "messages" (or "prompt" and "completion") with the pictures in "images",
in a file as paths. A row may have several pictures or none.

Adapters go into the language model and the vision encoder. PEFT alone refuses the encoder's layers
by name.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset, Image, Sequence, load_dataset
from peft import LoraConfig
from transformers import AutoProcessor, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import gemma_accel.auto  # noqa: F401 - the one line

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NOT_HEARD = r".*audio_tower.*"  # its layers bear the same names, and no row has a sound


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune Gemma 4 on images with TRL.")
    parser.add_argument("--model", required=True, help="a directory or a hub id")
    parser.add_argument("--dataset", required=True, help="a .jsonl file or a hub id")
    parser.add_argument("--output-dir", default="sft-vision")
    parser.add_argument(
        "--load-in-4bit", action="store_true", help="QLoRA: the frozen weights in NF4"
    )
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--lora-alpha", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--max-steps", type=int, default=-1, help="default: one epoch")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1)
    parser.add_argument("--soft-tokens", type=int, default=280, help="at most, for an image")
    parser.add_argument("--logging-steps", type=int, default=1)
    parser.add_argument(
        "--gpu-memory-gib", type=float, help="let the allocator have no more than this"
    )
    return parser.parse_args()


def dataset(name: str) -> Dataset:
    if not Path(name).is_file():
        return load_dataset(name, split="train")
    rows = load_dataset("json", data_files=name, split="train")
    folder = Path(name).resolve().parent
    if "images" not in rows.column_names:
        raise SystemExit(f"{name} has no column 'images'; sft_text.py is for text alone")

    def absolute(row: dict) -> dict:
        images = row["images"] or []
        paths = [images] if isinstance(images, str) else images
        return {"images": [str(folder / path) for path in paths]}

    rows = rows.map(absolute)
    return rows.cast_column("images", Sequence(Image()))


def main() -> None:
    args = arguments()
    cuda = torch.cuda.is_available()
    if cuda and args.gpu_memory_gib:
        total = torch.cuda.get_device_properties().total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.gpu_memory_gib * 2**30 / total))
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = "bfloat16" if bf16 else "float16" if cuda else "float32"
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    processor = AutoProcessor.from_pretrained(args.model)
    processor.image_processor.max_soft_tokens = args.soft_tokens
    trainer = SFTTrainer(
        model=args.model,
        args=SFTConfig(
            output_dir=args.output_dir,
            model_init_kwargs={"dtype": dtype},
            learning_rate=args.learning_rate,
            lr_scheduler_type="linear",
            max_steps=args.max_steps,
            num_train_epochs=1,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            max_length=None,  # a picture cut in the middle is an error, not a shorter row
            bf16=bf16,
            fp16=cuda and not bf16,
            optim="adamw_8bit" if cuda else "adamw_torch",
            logging_steps=args.logging_steps,
            report_to="none",
        ),
        train_dataset=dataset(args.dataset),
        processing_class=processor,
        quantization_config=quantization if args.load_in_4bit else None,
        peft_config=LoraConfig(
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            target_modules=LINEARS,
            exclude_modules=NOT_HEARD,
            task_type="CAUSAL_LM",
        ),
    )
    trainer.log_metrics("train", trainer.train().metrics)
    trainer.save_model()


if __name__ == "__main__":
    main()
