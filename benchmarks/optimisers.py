"""What a step teaches under each optimiser, and what it costs:
``python -m benchmarks.optimisers CONFIG [--steps N] [--every N] [--optimisers adamw muon]``.

The same run of ``mahlstick train --config CONFIG`` once under each optimiser, all from the same weights and on the same
cache, by turns, each in a fresh process: held-out losses by step, and the processor time of a run against the first's.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path


def run(config: str, optimiser: str, steps: int, every: int, out: Path) -> tuple[dict[int, float], float]:
    """Held-out losses by step, and the processor's seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "mahlstick.cli", "train", "--config", config, "--optimiser", optimiser]
    command += ["--steps", str(steps), "--validate-every", str(every), "--out", str(out)]
    subprocess.run([*command, "--checkpoint-every", str(steps)], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["step"]: row["held_out_loss"] for row in rows if "held_out_loss" in row}, seconds


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("config", help="of the run; it must name a cache")
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--every", type=int, default=100, help="steps between measurements")
    p.add_argument("--optimisers", nargs="+", default=["adamw", "muon"])
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # one step first, so that the cache is full and no run pays for it
        run(args.config, args.optimisers[0], 1, 0, Path(folder, "first"))
        found = {name: run(args.config, name, args.steps, args.every, Path(folder, name)) for name in args.optimisers}
    _, first = found[args.optimisers[0]]
    at = [*next(iter(found.values()))[0]]
    sys.stdout.write(f"| optimiser | {' | '.join(f'held-out loss at {step}' for step in at)} | time |\n")
    sys.stdout.write("|---" * (len(at) + 2) + "|\n")
    for name, (losses, seconds) in found.items():
        sys.stdout.write(f"| {name} | {' | '.join(f'{losses[step]:.5f}' for step in at)} | × {seconds / first:.2f} |\n")


if __name__ == "__main__":
    main()
