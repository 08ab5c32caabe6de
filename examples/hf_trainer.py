"""LISA in the Hugging Face Trainer: one line between creating the Trainer and training.

python examples/hf_trainer.py --model HuggingFaceTB/SmolLM2-135M --data tatsu-lab/alpaca --output tuned
"""

import argparse

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from lisatune import LISA, use_chunked_loss

parser = argparse.ArgumentParser(description="Fine-tune a language model with LISA in the HF Trainer.")
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="hub id or local folder")
parser.add_argument("--data", default="tatsu-lab/alpaca", help="hub id or local folder, with a column `text`")
parser.add_argument("--split", default="train[:1000]")
parser.add_argument("--output", default="tuned")
parser.add_argument("--resume", action="store_true", help="resume from the newest checkpoint in --output")
args = parser.parse_args()
tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)


def tokenize(row: dict[str, str]) -> dict[str, list[int]]:
    """Tokenize a text. All tokens carry loss, and the end token too: the collator masks padding by length."""
    token_ids = tokenizer(row["text"] + tokenizer.eos_token, truncation=True, max_length=512)["input_ids"]
    return {"input_ids": token_ids, "labels": token_ids}


data = load_dataset(args.data, split=args.split)
config = TrainingArguments(
    args.output,
    bf16=True,
    use_cpu=not torch.accelerator.is_available(),
    learning_rate=1e-5,  # that of full fine-tuning; LISA gives blocks a larger one in each step
    num_train_epochs=1,
    save_steps=50,
)
trainer = Trainer(
    model,
    config,
    train_dataset=data.map(tokenize, remove_columns=data.column_names),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    processing_class=tokenizer,
)
use_chunked_loss(model)  # the same loss, without holding the logits of all tokens in memory
# Trainer uses the optimizer created here. Its checkpoints save LISA's position inside the period.
lisa = LISA(trainer.model, trainer.create_optimizer(), active=2, period=10)
trainer.train(resume_from_checkpoint=args.resume)
lisa.check()
print(f"blocks trained at {lisa.lr_factor(0):.3g} x learning_rate")
trainer.save_model()
