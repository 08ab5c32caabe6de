"""LISA in a plain PyTorch loop.

python examples/plain_loop.py --model HuggingFaceTB/SmolLM2-135M --data tatsu-lab/alpaca --output tuned
"""

import argparse

import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from lisatune import LISA

parser = argparse.ArgumentParser(description="Fine-tune a language model with LISA in a plain PyTorch loop.")
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="hub id or local folder")
parser.add_argument("--data", default="tatsu-lab/alpaca", help="hub id or local folder, with a column `text`")
parser.add_argument("--split", default="train[:1000]")
parser.add_argument("--output", default="tuned")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
# fp32 weights, because bf16 would round AdamW's small updates away. Autocast computes in bf16 below.
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)


def tokenize(row: dict[str, str]) -> dict[str, list[int]]:
    """Tokenize a text. All tokens carry loss, and the end token too: the collator masks padding by length."""
    token_ids = tokenizer(row["text"] + tokenizer.eos_token, truncation=True, max_length=512)["input_ids"]
    return {"input_ids": token_ids, "labels": token_ids}


data = load_dataset(args.data, split=args.split)
data = data.map(tokenize, remove_columns=data.column_names)
loader = DataLoader(data, batch_size=8, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))

# The learning rate of full fine-tuning; LISA gives blocks a larger one in each step.
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
lisa = LISA(model, optimizer, active=2, period=10)

for step, batch in enumerate(loader, start=1):
    with torch.autocast(device, torch.bfloat16):
        loss = model(**batch.to(device)).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}  loss {loss.item():.3f}  blocks {lisa.active_blocks}")

lisa.check()
print(f"{lisa.periods_proven} full periods proven; visits of each block: {lisa.visits}")
model.save_pretrained(args.output)
tokenizer.save_pretrained(args.output)
