"""Memory and time of a long clip against a short one, from the first frame read to the last one written, in one run:

    python -m benchmarks.long_clips [--frames 32 512] [--steps 4]

The embedded model with a fresh motion module (it computes what a trained one computes), windows of 16 frames, a canny
control video in and an .mp4 out. Each clip is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIDE = 128


def control_video(path: Path, frames: int) -> None:
    """A disc that goes round."""
    from math import cos, sin

    from PIL import Image, ImageDraw

    from mahlstick.pipelines.video import VideoWriter

    with VideoWriter(path, 8, (SIDE, SIDE)) as writer:
        for frame in range(frames):
            x, y = (64 + 30 * turn(frame / 10) for turn in (cos, sin))
            picture = Image.new("RGB", (SIDE, SIDE), "white")
            ImageDraw.Draw(picture).ellipse((x - 20, y - 20, x + 20, y + 20), fill="tomato")
            writer.write(picture)


def make(frames: int, steps: int) -> None:
    """Make the clip, and print seconds, seconds a frame and MiB at most."""
    import mahlstick as ms

    pipe = ms.load_pipeline("embedded", device="cpu")
    heads = next(count for count in (8, 4, 2, 1) if not any(w % count for w in pipe.unet.config.block_out_channels))
    module = ms.MotionAdapter.from_unet(pipe.unet, heads=heads)
    net = ms.ControlNet.from_unet(pipe.unet)
    with tempfile.TemporaryDirectory() as folder:
        control_video(Path(folder) / "control.mp4", frames)
        control = {"adapter": net, "annotator": "canny", "image": str(Path(folder) / "control.mp4")}
        request = ms.VideoRequest(
            prompt="3D ball", frames=frames, motion=module, context=16, controls=[control], steps=steps, seed=1,
            width=SIDE, height=SIDE,
        )  # fmt: skip
        began = time.monotonic()
        ms.animate(request, Path(folder) / "clip.mp4", pipe=pipe, progress=False)
        seconds = time.monotonic() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"frames": frames, "seconds": seconds, "memory": memory}))


def main() -> None:
    """Print a row for each clip and the ratios of the last to the first."""
    parser = argparse.ArgumentParser(description="Memory and time of a long clip against a short one.")
    parser.add_argument("--frames", type=int, nargs="+", default=[32, 512])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        make(given.frames[0], given.steps)
        return
    found = []
    print("| frames | seconds a frame | MiB at most |\n|---|---|---|")
    for frames in given.frames:
        command = [sys.executable, "-m", "benchmarks.long_clips", "--make", "--frames", str(frames)]
        told = subprocess.run([*command, "--steps", str(given.steps)], capture_output=True, text=True, check=True)
        found.append(json.loads(told.stdout.splitlines()[-1]))
        clip = found[-1]
        print(f"| {frames} | {clip['seconds'] / frames:.3f} | {clip['memory']:.0f} |", flush=True)
    short, long = found[0], found[-1]
    memory = long["memory"] / short["memory"]
    seconds = (long["seconds"] / long["frames"]) / (short["seconds"] / short["frames"])
    print(f"\n{long['frames']} against {short['frames']} frames: memory × {memory:.3f}, time a frame × {seconds:.2f}")


if __name__ == "__main__":
    main()
