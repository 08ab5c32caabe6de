"""LISA in an Accelerate loop, with gradient accumulation and a learning-rate schedule.

python examples/accelerate_loop.py --model HuggingFaceTB/SmolLM2-135M --data tatsu-lab/alpaca --output tuned
"""

import argparse

import torch
from accelerate import Accelerator
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, get_scheduler

from lisatune import LISA

parser = argparse.ArgumentParser(description="Fine-tune a language model with LISA in an Accelerate loop.")
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="hub id or local folder")
parser.add_argument("--data", default="tatsu-lab/alpaca", help="hub id or local folder, with a column `text`")
parser.add_argument("--split", default="train[:1000]")
parser.add_argument("--output", default="tuned")
args = parser.parse_args()

accelerator = Accelerator(gradient_accumulation_steps=2, mixed_precision="bf16")
tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)


def tokenize(row: dict[str, str]) -> dict[str, list[int]]:
    """Tokenize a text. All tokens carry loss, and the end token too: the collator masks padding by length."""
    token_ids = tokenizer(row["text"] + tokenizer.eos_token, truncation=True, max_length=512)["input_ids"]
    return {"input_ids": token_ids, "labels": token_ids}


data = load_dataset(args.data, split=args.split)
data = data.map(tokenize, remove_columns=data.column_names)
loader = DataLoader(data, batch_size=4, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))

# The learning rate of full fine-tuning; LISA gives blocks a larger one in each step.
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
steps = (len(loader) + 1) // 2  # the last step of an epoch may have one micro-batch
scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=steps)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
lisa = LISA(model, optimizer, active=2, period=10)  # counts optimizer steps, not micro-steps

for batch in loader:
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    accelerator.print(f"step {lisa.steps_done}  loss {loss.item():.3f}  blocks {lisa.active_blocks}")

lisa.check()
accelerator.unwrap_model(model).save_pretrained(args.output)
tokenizer.save_pretrained(args.output)
