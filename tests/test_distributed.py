"""Two processes under ``accelerate launch`` learn what one process learns."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks import kill_resume
from benchmarks.kill_resume import lines
from mahlstick.training.config import from_flags
from mahlstick.training.run import train

CONFIG = Path(__file__).parents[1] / "docs" / "distributed" / "ddp.yaml"


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")
@pytest.mark.parametrize(("task", "optimiser"), [("clip", "adamw"), ("controlnet", "muon")])
def test_two_processes_give_the_result_of_one(task: str, optimiser: str, tmp_path: Path) -> None:
    """CLIP's loss is that of the whole batch, over both processes; Muon's work is shared between them."""
    kill_resume.draw_pictures(tmp_path / "pictures")
    kill_resume.base().save_pretrained(tmp_path / "base")
    flags = (
        f"{task} --base {tmp_path}/base --data {tmp_path}/pictures --resolution 64 --steps 3 --batch 4 --warmup 1"
        f" --optimiser {optimiser} --rate 1e-3 --log-every 1 --validate-every 3 --checkpoint-every 2 --held-out 0.2"
    ).split()
    flags += ["--annotator", "canny"] if task == "controlnet" else []
    one = train(from_flags([*flags, "--out", str(tmp_path / "one")]))

    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    launch += ["--num_processes", "2", "--main_process_port", "0", "-m", "mahlstick.cli", "train"]
    alone = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *flags, "--out", str(tmp_path / "two")], capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stderr

    for ours, theirs in zip(lines(one / "log.jsonl"), lines(tmp_path / "two" / "log.jsonl"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    wanted, found = tensors(one), tensors(tmp_path / "two")
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=2e-4, rtol=1e-3)
    encoded = [cached(folder / "cache") for folder in (one, tmp_path / "two")]
    assert sorted(encoded[0]) == sorted(encoded[1])  # the same, and none of it twice


def tensors(out: Path) -> dict[str, torch.Tensor]:
    """Everything in the result."""
    found = {}
    for path in sorted(out.rglob("*.safetensors")):
        inside = path.relative_to(out)
        if inside.parts[0] not in ("checkpoints", "cache"):
            with safe_open(path, "pt") as file:
                found |= {f"{inside}:{name}": file.get_tensor(name) for name in file.keys()}
    return found


def cached(folder: Path) -> list[str]:
    """The keys in all shards."""
    found = []
    for path in folder.rglob("features-*.safetensors"):
        with safe_open(path, "pt") as file:
            found += file.keys()
    return found
