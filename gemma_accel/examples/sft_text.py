"""Fine-tune Gemma 4 on text with TRL: a stock script, and one line.

    python sft_text.py --model google/gemma-4-E2B-it --dataset trl-lib/Capybara --load-in-4bit

The one line is `import gemma_accel.auto`. Without it this is a TRL script like any other, and
`gemma-accel run sft_text.py ...` does what the line does. The dataset is a hub id or a .jsonl file
with a column that TRL knows ("text", "messages", or "prompt" and "completion").
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import gemma_accel.auto  # noqa: F401 - the one line

# The language model's linear layers alone: PEFT refuses the towers' layers of the same names, which
# are not plain nn.Linear.
LANGUAGE_MODEL_LINEARS = (
    r"model\.(language_model\.)?layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune Gemma 4 on text with TRL.")
    parser.add_argument("--model", required=True, help="a directory or a hub id")
    parser.add_argument("--dataset", required=True, help="a .jsonl file or a hub id")
    parser.add_argument("--output-dir", default="sft-text")
    parser.add_argument(
        "--load-in-4bit", action="store_true", help="QLoRA: the frozen weights in NF4"
    )
    parser.add_argument(
        "--full", action="store_true", help="train every weight instead of an adapter"
    )
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--lora-alpha", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--max-steps", type=int, default=-1, help="default: one epoch")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=2048, help="tokens a row is cut to")
    parser.add_argument(
        "--packing", action="store_true", help="fill rows up with several documents"
    )
    parser.add_argument("--logging-steps", type=int, default=1)
    parser.add_argument(
        "--gpu-memory-gib", type=float, help="let the allocator have no more than this"
    )
    return parser.parse_args()


def dataset(name: str) -> Dataset:
    if Path(name).is_file():
        return load_dataset("json", data_files=name, split="train")
    return load_dataset(name, split="train")


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
    adapter = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        target_modules=LANGUAGE_MODEL_LINEARS,
        task_type="CAUSAL_LM",
    )
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
            max_length=args.max_length,
            packing=args.packing,
            bf16=bf16,
            fp16=cuda and not bf16,
            optim="adamw_8bit" if cuda else "adamw_torch",
            dataloader_pin_memory=cuda,
            logging_steps=args.logging_steps,
            report_to="none",
        ),
        train_dataset=dataset(args.dataset),
        processing_class=AutoTokenizer.from_pretrained(args.model),  # text only: no image processor
        quantization_config=quantization if args.load_in_4bit else None,
        peft_config=None if args.full else adapter,
    )
    metrics = {}
    if cuda:
        metrics["gpu_load_peak_gib"] = torch.cuda.max_memory_reserved() / 2**30
    metrics.update(trainer.train().metrics)
    if cuda:
        metrics["gpu_train_peak_gib"] = torch.cuda.max_memory_reserved() / 2**30
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_model()


if __name__ == "__main__":
    main()
