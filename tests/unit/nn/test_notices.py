"""What torchao and bitsandbytes log at import does not reach a terminal; everything else does."""

import logging
import subprocess
import sys

import pytest

from lisatune.nn.notices import silence_import_notices

PROGRAMS = [
    "from lisatune.optim.codecs import check_8bit; check_8bit()",
    "import torch; from lisatune.nn.nf4 import check_nf4; check_nf4(torch.device('cpu'))",
    """
from lisatune.methods import METHODS
from lisatune.models.hf import import_transformers
transformers = import_transformers()
size = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, bos_token_id=0, eos_token_id=0))
METHODS["lora"]().prepare(model)
""",
]


EACH_IN_A_PROCESS = """
import os, sys
import torch  # once for all; what the programs import besides is not imported yet
for program in sys.argv[1:]:
    if not (pid := os.fork()):
        exec(program, {})
        sys.exit()
    if code := os.waitpid(pid, 0)[1]:
        sys.exit(f"ends with {code}: {program}")
"""


def test_a_fresh_process_says_nothing() -> None:
    command = [sys.executable, "-c", EACH_IN_A_PROCESS, *PROGRAMS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_other_lines_of_these_loggers_still_show(caplog: pytest.LogCaptureFixture) -> None:
    silence_import_notices()
    logger = logging.getLogger("torch.utils._pytree")
    with caplog.at_level(logging.WARNING, logger=logger.name):
        logger.warning("<enum 'Kernel'> is an Enum subclass and is now natively supported")
        logger.warning("a tree has no leaves")
    assert caplog.messages == ["a tree has no leaves"]
