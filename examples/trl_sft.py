"""LISA in TRL's SFTTrainer, which provides chat templates, answer masks and packing.

python examples/trl_sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data trl-lib/Capybara --output tuned
"""

import argparse

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from lisatune import LISA

parser = argparse.ArgumentParser(description="Fine-tune a language model with LISA in TRL's SFTTrainer.")
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id or local folder")
parser.add_argument(
    "--data", default="trl-lib/Capybara", help="hub id or local folder, in any format TRL knows"
)
parser.add_argument("--split", default="train[:1000]")
parser.add_argument("--output", default="tuned")
parser.add_argument("--resume", action="store_true", help="resume from the newest checkpoint in --output")
args = parser.parse_args()

# TRL's defaults suit LISA: fp32 weights, computing in bf16, and activations recomputed in backward.
config = SFTConfig(
    args.output,
    use_cpu=not torch.accelerator.is_available(),
    learning_rate=1e-5,  # that of full fine-tuning; LISA gives blocks a larger one in each step
    max_length=1024,
    num_train_epochs=1,
    save_steps=50,
)
trainer = SFTTrainer(args.model, config, train_dataset=load_dataset(args.data, split=args.split))
# SFTTrainer uses the optimizer created here. Its checkpoints save LISA's position inside the period.
lisa = LISA(trainer.model, trainer.create_optimizer(), active=2, period=10)
trainer.train(resume_from_checkpoint=args.resume)

lisa.check()
print(f"blocks trained at {lisa.lr_factor(0):.3g} x learning_rate")
trainer.save_model()
