"""The command line: ``python -m mahlstick.training.embedded STAGE``."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

# stage → (what it does, minutes on two slow cores, batch, learning rate, decay of the average)
STAGES: dict[str, tuple[str, float, int, float, float]] = {
    "data": ("fetch the packages with npm and draw the pictures", 0, 0, 0, 0),
    "pictures": ("write them into CACHE/pictures, as folders to train on and to evaluate with", 0, 0, 0, 0),
    "vae": ("pictures <-> latents", 15, 8, 1e-3, 0.99),
    "clip": ("text and image towers, contrastively", 6, 128, 1e-3, 0.98),
    "text": ("teach the text encoder where things are in a picture", 5, 64, 1e-3, 0.99),
    "base": ("the UNet, on the frozen text encoder", 182, 32, 6e-4, 0.998),
    "controlnet": ("line-art ControlNet on the frozen base", 100, 16, 7e-4, 0.99),
    "ip-adapter": ("image prompts on the frozen base", 12, 16, 1e-3, 0.99),
    "examples": ("draw the example inputs into assets/examples", 0, 0, 0, 0),
    "assemble": ("write assets/embedded from the cache", 0, 0, 0, 0),
    "evaluate": ("measure control, image prompts and words, and write the figures into the model card", 0, 0, 0, 0),
}


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    lines = "\n".join(
        f"  {name:<11} {facts[0]}" + (f" ({facts[1]:g} min)" if facts[1] else "") for name, facts in STAGES.items()
    )
    p = argparse.ArgumentParser(
        prog="python -m mahlstick.training.embedded",
        description="Train the embedded model: a tiny Stable Diffusion with a ControlNet and an IP-Adapter.",
        epilog=f"stages, in order:\n{lines}\n  all         every one of them\n\n"
        "A stage that was stopped goes on when the command is run again; a larger --minutes extends a finished one.\n"
        "Example: python -m mahlstick.training.embedded base --minutes 90",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("stage", choices=[*STAGES, "all"], help="what to do; see below")
    p.add_argument("--minutes", type=float, help="training time of this stage (with `all`: ignored)")
    p.add_argument("--steps", type=int, help="stop after so many steps, if that comes first")
    p.add_argument("--batch", type=int, help="pictures a step")
    p.add_argument("--lr", type=float, help="peak learning rate")
    p.add_argument("--seed", type=int, default=20, help="seed of everything random (default 20)")
    p.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="processor threads (default: all)")
    p.add_argument(
        "--cache",
        type=Path,
        default=Path(".cache/embedded"),
        help="where pictures and checkpoints live (default .cache/embedded)",
    )
    p.add_argument("--out", type=Path, default=Path("assets"), help="where assemble and evaluate write (assets)")
    p.add_argument("--fresh", action="store_true", help="start the stage again from nothing")
    return p


def main(argv: list[str] | None = None) -> None:
    """Run one stage, or all of them."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    import torch

    torch.set_num_threads(args.threads or 1)
    torch.set_flush_denormal(True)
    for stage in STAGES if args.stage == "all" else [args.stage]:
        run_stage(stage, args)


def run_stage(stage: str, args: argparse.Namespace) -> None:
    """One stage with its defaults where the command line says nothing."""
    from mahlstick.training.embedded import data, train

    pictures = data.load(args.cache)
    _, minutes, batch, lr, ema = STAGES[stage]
    alone = args.stage == stage
    run = train.Run(
        cache=args.cache,
        minutes=(args.minutes if alone and args.minutes else minutes) or 1,
        steps=args.steps if alone else None,
        batch=(args.batch if alone and args.batch else batch) or 1,
        lr=(args.lr if alone and args.lr else lr) or 1.0,
        ema=ema,
        seed=args.seed,
        device=args.device,
        fresh=args.fresh and alone,
    )
    if stage == "data":
        logging.info(
            "%d concepts to train on, %d held out, %d pictures", *data.split_counts(pictures), len(pictures.rgba)
        )
    elif stage == "pictures":
        data.export(pictures, args.cache / "pictures")
    elif stage == "examples":
        from mahlstick.training.embedded import examples

        examples.write(args.cache, args.out)
    elif stage == "vae":
        train.train_vae(pictures, run)
    elif stage == "clip":
        train.train_clip(pictures, run)
    elif stage == "text":
        train.train_layout(pictures, run)
    elif stage == "base":
        train.train_base(pictures, run)
    elif stage == "controlnet":
        train.train_controlnet(pictures, run)
    elif stage == "ip-adapter":
        train.train_ip_adapter(pictures, run)
    else:
        from mahlstick.training.embedded import evaluate

        if stage == "assemble":
            evaluate.assemble(pictures, run, args.out)
        else:
            evaluate.evaluate(pictures, run, args.out)


if __name__ == "__main__":
    main()
