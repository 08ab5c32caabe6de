"""LISA on Stable Diffusion 1.5: distil its UNet into a latent consistency model of 4 steps.

pip install lisatune diffusers transformers datasets pillow
python experiments/sd15_lcm.py --data lambdalabs/naruto-blip-captions --output sd15-lcm

Not run on Stable Diffusion's weights: it was tried with a small random pipeline, and LISA's draws with the
UNet's real shape. The student learns to jump from any noise level t to the clean latent. With s the next
lower of 50 levels, and x_s one DDIM step of the guided teacher from x_t (Luo et al., arXiv 2310.04378, with
one guidance scale),

    loss = huber( f(x_t, t), f(x_s, s) )       the second f without gradient
"""

import argparse
import copy
from typing import Any

import torch
from datasets import load_dataset
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline
from torch import Tensor, nn
from torch.nn.functional import huber_loss, interpolate
from torch.utils.data import DataLoader

from lisatune import LISA, find_layers

parser = argparse.ArgumentParser(description="Distil Stable Diffusion into a latent consistency model.")
parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="hub id or folder")
parser.add_argument("--data", default="lambdalabs/naruto-blip-captions", help="has columns `image`, `text`")
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--size", type=int, default=512, help="pixels of a side")
parser.add_argument(
    "--active", type=int, default=3, help="so many average blocks' parameters train at a time"
)
parser.add_argument("--guidance", type=float, default=7.5)
parser.add_argument("--output", default="sd15-lcm")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
pipeline = StableDiffusionPipeline.from_pretrained(args.model, safety_checker=None).to(device)
student, teacher = pipeline.unet, copy.deepcopy(pipeline.unet).requires_grad_(False)
schedule = DDIMScheduler.from_config(pipeline.scheduler.config)
alphas = schedule.alphas_cumprod.to(device)
LEVEL = schedule.config.num_train_timesteps // 50


def split_noise(model: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Predict the noise in latents [B, C, H, W] at t int64 [B], and the clean latents."""
    noise = model(x, t, encoder_hidden_states=text).sample
    return noise, schedule_split(x, noise, t)


def schedule_split(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Take a noise out of latents."""
    alpha = alphas[t].view(-1, 1, 1, 1)
    return (x - (1 - alpha).sqrt() * noise) / alpha.sqrt()


def jump(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """Return f of the student: the identity at t = 0, the clean latent far from it."""
    scaled = 10.0 * t.view(-1, 1, 1, 1)
    keep, change = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
    return keep * x + change * split_noise(student, x, t, text)[1]


def encode_text(captions: list[str]) -> Tensor:
    """Encode captions, float32 [B, T, D]."""
    longest = pipeline.tokenizer.model_max_length
    ids = pipeline.tokenizer(
        captions, padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
    )
    return pipeline.text_encoder(ids.input_ids.to(device))[0]


def collate(rows: list[dict[str, Any]]) -> tuple[Tensor, list[str]]:
    """Make images float32 [B, 3, size, size] in [-1, 1] and their captions."""
    images = []
    for row in rows:
        image = row["image"].convert("RGB")
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(image.height, image.width, 3).permute(2, 0, 1).float() / 127.5 - 1
        side = min(image.height, image.width)
        top, left = (image.height - side) // 2, (image.width - side) // 2
        square = pixels[None, :, top : top + side, left : left + side]
        images.append(interpolate(square, size=(args.size, args.size), mode="bilinear", antialias=True))
    return torch.cat(images), [row["text"] for row in rows]


# A UNet's middle block stands beside two lists of blocks, so the order is given.
blocks = [f"down_blocks.{i}" for i in range(len(student.down_blocks))]
blocks += ["mid_block", *(f"up_blocks.{i}" for i in range(len(student.up_blocks)))]
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, weight_decay=0.0)
lisa = LISA(student, optimizer, unit="sized", active=args.active, layers=find_layers(student, blocks=blocks))

data = load_dataset(args.data, split="train")
loader = DataLoader(data, batch_size=args.batch, shuffle=True, drop_last=True, collate_fn=collate)
step = 0
while step < args.steps:
    for images, captions in loader:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            latents = (
                pipeline.vae.encode(images.to(device)).latent_dist.sample()
                * pipeline.vae.config.scaling_factor
            )
            text, no_text = encode_text(captions), encode_text([""] * len(captions))
            t = torch.randint(1, 50, (len(latents),), device=device) * LEVEL + LEVEL - 1
            s = t - LEVEL
            x = schedule.add_noise(latents, torch.randn_like(latents), t)
            noise, plain_noise = split_noise(teacher, x, t, text)[0], split_noise(teacher, x, t, no_text)[0]
            noise = plain_noise + args.guidance * (noise - plain_noise)
            x_s = schedule.add_noise(schedule_split(x, noise, t), noise, s)
            wanted = jump(x_s, s, text)
        with torch.autocast(device, torch.bfloat16):
            loss = huber_loss(jump(x, t, text).float(), wanted.float(), delta=1e-3)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        print(f"step {step}  loss {loss.item():.5f}  blocks {lisa.active_blocks}")
        if step == args.steps:
            break

lisa.check()
print(f"{lisa.periods_proven} full periods proven; visits of each block: {lisa.visits}")
pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
pipeline.save_pretrained(args.output)
