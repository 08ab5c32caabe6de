"""Turn training rows of GSM8K and PubMedQA into prompts and completions, as the benchmarks ask.

python experiments/benchmark_rows.py gsm8k train.jsonl gsm8k.jsonl
python experiments/benchmark_rows.py pubmedqa ori_pqaa.jsonl pubmedqa.jsonl

gsm8k takes `question` and `answer`, which ends in `#### N`. The completion leaves out <<calculator marks>>
and ends in "The answer is N.", which both filters of the task gsm8k_cot read. pubmedqa takes `question`,
`contexts` and `final_decision`. Files may end in .gz.
"""

import gzip
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def main(arguments: list[str]) -> int:
    """Convert one file."""
    if len(arguments) != 3 or arguments[0] not in CONVERT:
        sys.exit(__doc__)
    name, source, target = arguments
    rows = [CONVERT[name](row) for row in read(Path(source))]
    Path(target).write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    print(f"{len(rows):,} rows: {target}")
    return 0


def read(file: Path) -> Iterator[Row]:
    """Read the rows of a .jsonl file, which may be compressed."""
    open_text = gzip.open if file.suffix == ".gz" else open
    with open_text(file, "rt", encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


def from_gsm8k(row: Row) -> Row:
    """Ask as gsm8k_cot does."""
    reasoning, _, number = re.sub(r"<<.*?>>", "", row["answer"]).partition("####")
    steps = " ".join(reasoning.split())
    return {"prompt": f"Q: {row['question']}\nA:", "completion": f" {steps} The answer is {number.strip()}."}


def from_pubmedqa(row: Row) -> Row:
    """Ask as pubmedqa does."""
    contexts = "\n".join(row["contexts"])
    prompt = f"Abstract: {contexts}\nQuestion: {row['question']}\nAnswer:"
    return {"prompt": prompt, "completion": f" {row['final_decision']}"}


CONVERT = {"gsm8k": from_gsm8k, "pubmedqa": from_pubmedqa}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
