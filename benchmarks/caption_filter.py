"""How well a judge finds captions that belong to other pictures, and how well a captioner's fit their own.

``python -m benchmarks.caption_filter --data FOLDER --filter CLIP`` gives three in ten captions to other pictures and
prints the area under the curve (AUC) of telling these from the others by their scores: 0.5 is chance, 1 is perfect.
With ``--model CAPTIONER`` it captions the pictures, and compares the captions' scores with those of shuffled ones.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from mahlstick.training import judges, metrics
from mahlstick.training.captions import captioners
from mahlstick.training.data import Example, read_dataset

SHARE = 0.3


def shuffled(captions: list[str], share: float, seed: int) -> tuple[list[str], np.ndarray]:
    """Captions of which a share has been passed on among its own, none of them to one of the same words; and whether
    each was."""
    lots = random.Random(seed)
    chosen = sorted(lots.sample(range(len(captions)), round(share * len(captions))))
    found, passed = list(captions), np.zeros(len(captions), bool)
    for i, j in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        if captions[i] != captions[j]:
            found[i], passed[i] = captions[j], True
    return found, passed


def auc(scores: np.ndarray, wrong: np.ndarray) -> float:
    """How often a right pair scores higher than a wrong one; a tie is half (Mann and Whitney)."""
    ranks, count = rankdata(scores), int((~wrong).sum())
    return float((ranks[~wrong].sum() - count * (count + 1) / 2) / (count * wrong.sum()))


def interval(scores: np.ndarray, wrong: np.ndarray, samples: int = 1000) -> tuple[float, float]:
    """95 % of the AUCs of pairs drawn with replacement."""
    lots = np.random.default_rng(0)
    draws = (lots.integers(len(scores), size=len(scores)) for _ in range(samples))
    low, high = np.quantile([auc(scores[draw], wrong[draw]) for draw in draws if wrong[draw].any()], (0.025, 0.975))
    return float(low), float(high)


def of_pairs(judge: judges.Matcher, examples: list[Example], texts: list[str], batch: int = 32) -> np.ndarray:
    """Each picture's score with its text."""
    found: list[float] = []
    for at in range(0, len(examples), batch):
        part = slice(at, at + batch)
        scores = judge.scores([example.load() for example in examples[part]], [[text] for text in texts[part]])
        found += [of[0] for of in scores]
    return np.array(found)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--data", type=Path, required=True, help="pictures with captions")
    flags.add_argument("--filter", default="embedded", help="the judge")
    flags.add_argument("--model", help="a captioner to judge as well")
    flags.add_argument("--count", type=int, help="how many pictures; left out, all")
    flags.add_argument("--seed", type=int, default=0)
    options = flags.parse_args()
    examples = read_dataset(options.data)
    random.Random(options.seed).shuffle(examples)
    examples = examples[: options.count]
    judge = judges.load_matcher(options.filter)
    captions = [example.captions[0] for example in examples]
    texts, wrong = shuffled(captions, SHARE, options.seed)
    scores = of_pairs(judge, examples, texts)
    low, high = interval(scores, wrong)
    print(f"{len(examples)} pictures, {int(wrong.sum())} captions of other pictures: AUC {auc(scores, wrong):.3f}"
          f" ({low:.3f} to {high:.3f})")  # fmt: skip
    if options.model is None:
        return
    captioner, written = captioners.load(options.model), list[str]()
    for at in range(0, len(examples), 32):
        pictures = [example.load() for example in examples[at : at + 32]]
        written += [" ".join(text.split()) for text in captioner.generate(pictures, max_new_tokens=40, do_sample=False)]
    passed, _ = shuffled(written, 1.0, options.seed)
    for name, of in (("written", written), ("shuffled", passed), ("the pictures' own", captions)):
        mean, low, high = metrics.mean_with_interval(of_pairs(judge, examples, of))
        print(f"{judge.measure} of captions {name}: {mean:.3f} ({low:.3f} to {high:.3f})")
    print("written, for example:", "; ".join(sorted(set(written))[:: max(1, len(set(written)) // 8)]))


if __name__ == "__main__":
    main()
