"""The LISA paper's comparisons on SmolLM2-135M, each a recipe for `lisatune compare`.

python experiments/compare.py table2 [--smoke] [section.key=value …] [options of lisatune compare]

table2  methods side by side            table7  sampler, state of frozen blocks, warm-up
table6  active blocks × period          draws   five seeds of the draws alone
gap     what could close the gap to full fine-tuning
benchmarks, gsm8k, pubmedqa  scores of benchmark tasks; continual  half of Table 4, before then_sft.py

The data is python-docs unless `data.train=` and `data.validation=` name other data. `--general FILE` also
measures forgetting. The same command continues a stopped comparison. Results are in runs/NAME-compare, or
with --smoke in runs/NAME-smoke.
"""

import re
import sys
from pathlib import Path

from lisatune.cli.app import main
from lisatune.files import yaml

RECIPES = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}

SMOKE = (
    *("data.max_length=64", "data.limit=64", "data.validation_limit=16", "run.batch_size=1"),
    *("--budget", "steps=2", "--seeds", "1", "--lr", "1e-4"),
)
"""Two steps of every arm at one learning rate, to see that it runs."""


def make_arguments(given: list[str]) -> list[str]:
    """Turn the arguments of this script into arguments of `lisatune`."""
    names = [name for name in given if name in RECIPES]
    if len(names) != 1:
        sys.exit(f"name one of {', '.join(RECIPES)}")
    rest = [each for each in given if each not in ("--smoke", *names)]
    smoke = [*SMOKE, "--output", f"runs/{names[0]}-smoke"] if "--smoke" in given else []
    tasks = yaml.load(RECIPES[names[0]].read_text(encoding="utf-8"))["compare"].get("evaluate")
    if smoke and tasks is not None:
        smoke += ["--evaluate", re.sub(r"limit=\d+", "limit=1", tasks)]
    return ["compare", str(RECIPES[names[0]]), *rest, *smoke]


if __name__ == "__main__":
    sys.exit(main(make_arguments(sys.argv[1:])))
