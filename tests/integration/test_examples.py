"""The scripts in examples/ run as they stand, on a tiny model and without a hub."""

import json
import random
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parents[2] / "examples"
