"""Sums of a number below 40 and a digit, three worked examples in front: a data set of ``question`` and ``answer``.

    python bench/smollm2/prompts.py --output smollm2/sums.jsonl --count 400 --seed 1

Every pass goes through all 300 sums (10 to 39, plus 0 to 9) in random order; each time a sum comes up it gets new
examples (none of them the sum itself).  Training (seed 0) and held-out prompts (another seed) therefore share the
300 sums but not the prompts.  Sums of two digits would do as well, but six GRPO steps are enough for the model to
get nearly all of them right, and then hardly a group has both right and wrong answers.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

SHOT = "Question: What is {a} + {b}?\nAnswer: {c}\n"
QUESTION = "Question: What is {a} + {b}?\nAnswer:"
PAIRS = [(a, b) for a in range(10, 40) for b in range(10)]


def three_shot_sums(count: int, seed: int) -> list[dict[str, str]]:
    """``count`` rows of ``prompt_id``, ``question`` (three examples and the open sum) and ``answer``."""
    generator = random.Random(seed)
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        for a, b in generator.sample(PAIRS, len(PAIRS)):
            shots = generator.sample([pair for pair in PAIRS if pair != (a, b)], 3)
            examples = "".join(SHOT.format(a=x, b=y, c=x + y) for x, y in shots)
            rows.append(
                {
                    "prompt_id": f"sums-{seed}-{len(rows):04d}",
                    "question": examples + QUESTION.format(a=a, b=b),
                    "answer": str(a + b),
                }
            )
    return rows[:count]


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="jsonl file to write")
    parser.add_argument("--count", type=int, default=400, help="number of prompts")
    parser.add_argument("--seed", type=int, default=1, help="0 is the seed of the training prompts")
    args = parser.parse_args(argv)
    lines = [json.dumps(row) for row in three_shot_sums(args.count, args.seed)]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("\n".join(lines) + "\n")
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
