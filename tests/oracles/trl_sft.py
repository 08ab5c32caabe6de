"""TRL's own tests of SFTTrainer, with LISA attached to the optimizer of every trainer.

    git clone https://github.com/huggingface/trl /tmp/trl    # at the tag nearest to the installed TRL
    TRL_TESTS=/tmp/trl .venv/bin/python tests/oracles/trl_sft.py

Further arguments go to pytest. The tests run twice at once, without and with LISA, each in its own process.
A test that passes without LISA must pass with it: losses, saved models, resumed runs and callbacks are then
what TRL expects of them. The script prints the counts, names the tests that LISA breaks, and exits with 1 if
there are any. Without `TRL_TESTS` it says so and exits with 0.

Nothing is downloaded. The tests take tiny models and data sets from the hub. Models of the same architecture
with random weights, TRL's chat templates and made-up rows stand in for them. Tests that need another model, a
GPU or a missing package fail or are skipped in both runs, so they say nothing.

LISA trains one of two blocks at a time and draws after every step, so each weight moves in two steps, as the
tests want. It is not attached to trainers with adapters, because it refuses these.
"""

import ast
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINK = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
OSS = ["<|startoftext|>", "<|endoftext|>", "<|return|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>"]
GLM = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"]
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 8}

MODELS: dict[str, tuple[str, dict[str, Any], str | None, list[str], str]] = {
    "tiny-Qwen2ForCausalLM-2.5": ("qwen2", {}, "qwen2_5", QWEN, "<|im_end|>"),
    "tiny-Qwen3ForCausalLM": ("qwen3", {"head_dim": 8}, "qwen3", QWEN + THINK, "<|im_end|>"),
    "tiny-Qwen3MoeForCausalLM": (
        "qwen3_moe",
        EXPERTS | {"num_experts": 4},
        "qwen3",
        QWEN + THINK,
        "<|im_end|>",
    ),
    "tiny-LlamaForCausalLM-3.2": ("llama", {}, "llama3_2", LLAMA, "<|eot_id|>"),
    "tiny-MistralForCausalLM-0.2": ("mistral", {}, None, ["<s>", "</s>"], "</s>"),
    "tiny-GPTNeoXForCausalLM": ("gpt_neox", {}, None, ["<|endoftext|>"], "<|endoftext|>"),
    "tiny-GptOssForCausalLM": (
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
        "gptoss",
        OSS,
        "<|return|>",
    ),
    "tiny-Glm4MoeForCausalLM": (
        "glm4_moe",
        EXPERTS | {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
        "glm4moe",
        GLM,
        "<|endoftext|>",
    ),
    "tiny-Lfm2ForCausalLM": (
        "lfm2",
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        "lfm2",
        QWEN,
        "<|im_end|>",
    ),
    "tiny-Olmo3ForCausalLM": ("olmo3", {"sliding_window": 16}, "qwen2_5", QWEN, "<|im_end|>"),
}
"""For each model: architecture, config, chat template, special tokens, and the one that ends turns."""

SHAPE = {
    "hidden_size": 8,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}

PAIRS = [(f"Which number follows {number}?", f"It is {number + 1}.") for number in range(19)]


def make_rows(config: str) -> list[dict[str, Any]]:
    """Make up the rows of a data set's configuration: 17 to train on and 2 to test."""
    rows: list[dict[str, Any]] = []
    for question, answer in PAIRS:
        user, bot = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
        rows.append(
            {
                "standard_language_modeling": {"text": f"{question} {answer}"},
                "standard_prompt_completion": {"prompt": question, "completion": f" {answer}"},
                "standard_implicit_prompt_preference": {"chosen": answer, "rejected": question},
                "conversational_language_modeling": {"messages": [user, bot]},
                "conversational_prompt_completion": {"prompt": [user], "completion": [bot]},
            }[config]
        )
    return rows


def load_dataset(path: str, config: str = "", split: str | None = None, streaming: bool = False) -> Any:
    """Stand in for `datasets.load_dataset`."""
    from datasets import Dataset, DatasetDict, IterableDatasetDict

    if path != "trl-internal-testing/zen":
        raise ConnectionError(f"{path} is not made up here")
    rows = make_rows(config)
    parts = DatasetDict(train=Dataset.from_list(rows[:17]), test=Dataset.from_list(rows[17:]))
    name, _, count = (split or "").partition("[:")
    found = parts[name] if name else parts
    if count:
        found = found.select(range(int(count.rstrip("]"))))
    if not streaming:
        return found
    return found.to_iterable_dataset() if name else IterableDatasetDict(parts)


def write_hub(folder: Path, texts: list[str]) -> None:
    """Write all models as a cache of the hub."""
    for name, (kind, config, template, special, end) in MODELS.items():
        root = folder / f"models--trl-internal-testing--{name}"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text("made-up")
        write_model(root / "snapshots" / "made-up", kind, config, template, special, end, texts)


def write_model(
    folder: Path,
    kind: str,
    config: dict[str, Any],
    template: str | None,
    special: list[str],
    end: str,
    texts: list[str],
) -> None:
    """Write a model with random weights and a tokenizer trained on `texts`."""
    import torch
    import trl
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pieces.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.eos_token, tokenizer.pad_token = end, special[0]
    if template is not None:
        templates = Path(trl.__file__).parent / "chat_templates"
        tokenizer.chat_template = (templates / f"{template}.jinja").read_text(encoding="utf-8")
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    model_config = CONFIG_MAPPING[kind](**SHAPE | config | ids, bos_token_id=None, vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(model_config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fill_in_names(*files: Path) -> None:
    """Let the files import names that only their own version of TRL has. No test that runs here needs them.

    Most ask whether a package is there, so what is filled in says no.
    """
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and str(node.module).startswith("trl"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        setattr(module, alias.name, lambda *_, **__: False)


class Plugin:
    """Collects the outcomes of tests, and attaches LISA if asked."""

    def __init__(self, attaches: bool) -> None:
        import datasets

        datasets.load_dataset = load_dataset
        self.outcomes: dict[str, str] = {}
        self.num_attached = 0
        if attaches:
            self.attach()

    def attach(self) -> None:
        """Attach LISA wherever a trainer makes its optimizer, and check it after training."""
        from peft import PeftModel
        from trl import SFTTrainer

        from lisatune import LISA

        create_optimizer, train = SFTTrainer.create_optimizer, SFTTrainer.train

        def create(trainer: Any, *arguments: Any, **options: Any) -> Any:
            optimizer = create_optimizer(trainer, *arguments, **options)
            model = trainer.accelerator.unwrap_model(trainer.model)
            known = getattr(trainer, "lisa", None)
            if known is None and not isinstance(model, PeftModel):
                trainer.lisa = LISA(model, optimizer, active=1, period=1)
                self.num_attached += 1
            return optimizer

        def train_and_check(trainer: Any, *arguments: Any, **options: Any) -> Any:
            result = train(trainer, *arguments, **options)
            if hasattr(trainer, "lisa"):
                trainer.lisa.check()
            return result

        SFTTrainer.create_optimizer, SFTTrainer.train = create, train_and_check

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note how a test ended."""
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome


def run_once(sources: Path, attaches: bool, result: Path, arguments: list[str]) -> None:
    """Run TRL's tests in this process and write their outcomes."""
    import pytest

    plugin = Plugin(attaches)
    os.chdir(sources)
    fill_in_names(sources / "tests" / "testing_utils.py", sources / "tests" / "test_sft_trainer.py")
    tests = ["tests/test_sft_trainer.py", "-k", "TestSFTTrainer and not Slow"]
    pytest.main(["-q", "-p", "no:cacheprovider", "--tb=line", *tests, *arguments], plugins=[plugin])
    result.write_text(json.dumps({"outcomes": plugin.outcomes, "attached": plugin.num_attached}))


def main(arguments: list[str]) -> int:
    """Run the tests without and with LISA, and compare."""
    sources = os.environ.get("TRL_TESTS")
    if not sources or not (Path(sources) / "tests" / "test_sft_trainer.py").is_file():
        sys.stdout.write("skipped: set TRL_TESTS to a checkout of TRL, which has tests/test_sft_trainer.py\n")
        return 0
    results = []
    with tempfile.TemporaryDirectory() as folder:
        write_hub(Path(folder), [" ".join(pair) for pair in PAIRS] * 20)
        environment = os.environ | {
            "HF_HUB_CACHE": folder,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        running = []
        for attaches in ("", "lisa"):
            result = Path(folder) / f"result{attaches}.json"
            command = [sys.executable, __file__, "--once", sources, attaches, str(result), *arguments]
            running.append((subprocess.Popen(command, env=environment), result))
        for process, result in running:
            process.wait()
            results.append(json.loads(result.read_text()))
    plain, with_lisa = results
    for name, each in (("without LISA", plain), ("with LISA", with_lisa)):
        outcomes = list(each["outcomes"].values())
        counts = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("passed", "failed", "skipped"))
        sys.stdout.write(f"{name}: {counts}; LISA was attached to {each['attached']} optimizers\n")
    passed = [test for test, outcome in plain["outcomes"].items() if outcome == "passed"]
    broken = [test for test in passed if with_lisa["outcomes"].get(test) != "passed"]
    sys.stdout.write("".join(f"broken by LISA: {test}\n" for test in broken))
    return 1 if broken else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--once"]:
        run_once(Path(sys.argv[2]), bool(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:])
    else:
        sys.exit(main(sys.argv[1:]))
