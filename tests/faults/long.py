"""The long runs behind docs/reliability.md.

    python tests/faults/long.py --kills 240      SIGKILL at random moments, every resume compared bit for bit
    python tests/faults/long.py --fuzz 2000      changed recipes, records, checkpoints and models

Each prints a table, and exits with 1 if anything went wrong.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "support")]


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=0, help="number of SIGKILLs, at least")
    parser.add_argument("--fuzz", type=int, default=0, help="number of changed inputs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and changes")
    options = parser.parse_args()
    started, fine = time.monotonic(), True
    with tempfile.TemporaryDirectory() as folder:
        if options.kills:
            fine &= kill(Path(folder), options.kills, options.seed)
        if options.fuzz:
            fine &= fuzz(Path(folder), options.fuzz, options.seed)
    print(f"{time.monotonic() - started:.0f} s, seed {options.seed}")
    return 0 if fine else 1


def kill(folder: Path, at_least: int, seed: int) -> bool:
    """Kill runs of every variant, up to six times each, until there are enough kills."""
    from faults import kills, runs

    print(f"| run | {' | '.join(kills.KINDS)} | resumes | begun again | compared | mismatches |")
    print("| --- |" + " --: |" * (len(kills.KINDS) + 4))
    generator, total = random.Random(seed), kills.Tally()
    for number, variant in enumerate(runs.VARIANTS):
        series, tally = kills.Series(folder / str(number), variant), kills.Tally()
        while sum(tally.kills.values()) < at_least / len(runs.VARIANTS):
            kinds = generator.choices(kills.KINDS, k=generator.randint(1, 6))
            tally.add(series.kill_and_compare(generator, kinds))
        print(row(variant, tally), flush=True)
        total.add(tally)
    print(row(f"**all, {sum(total.kills.values())} kills**", total))
    for mismatch in total.mismatches:
        print(mismatch)
    return not total.mismatches


def row(name: str, tally: "kills.Tally") -> str:  # noqa: F821
    """Format one line of the table."""
    counts = (*tally.kills.values(), tally.resumes, tally.restarts, tally.finished, len(tally.mismatches))
    return f"| {name} | {' | '.join(map(str, counts))} |"


def fuzz(folder: Path, cases: int, seed: int) -> bool:
    """Feed changed inputs, the same number of each kind."""
    from faults.fuzzing import Fuzz, Outcome

    fuzz, failures, total = Fuzz(folder / "fuzz"), [], Outcome()
    print("| input | cases | taken | refused in a sentence | failures |\n| --- | --: | --: | --: | --: |")
    each = -(-cases // len(fuzz.kinds))
    for kind in fuzz.kinds:
        outcome = Outcome()
        for case in range(each):
            fuzz.run(kind, seed * each + case, outcome)
        figures = (outcome.cases, outcome.taken, outcome.refused, len(outcome.failures))
        print(f"| {kind} | {' | '.join(map(str, figures))} |", flush=True)
        total.cases, total.taken = total.cases + outcome.cases, total.taken + outcome.taken
        total.refused += outcome.refused
        failures += outcome.failures
    print(f"| **all** | {total.cases} | {total.taken} | {total.refused} | {len(failures)} |")
    for failure in failures:
        print(failure)
    return not failures


if __name__ == "__main__":
    sys.exit(main())
