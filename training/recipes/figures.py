"""What the model card says of the assembled model, each figure by ``mahlstick evaluate``."""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path
from typing import Any

from mahlstick.errors import MahlstickError
from mahlstick.pipelines.load import Loader
from mahlstick.training.evaluate import EvaluateConfig, evaluate

log = logging.getLogger(__name__)

BATCH = 16


def runs(cache: Path) -> dict[str, EvaluateConfig]:
    """Every evaluation of the embedded model by name. Those that share their pictures make them once."""

    def run(data: str, out: str, **fields: Any) -> EvaluateConfig:
        for field in ("control_pictures", "references"):
            if field in fields:
                fields[field] = str(cache / "pictures" / fields[field])
        for field in ("classifier", "features"):
            if field in fields:
                fields[field] = str(cache / "judges" / fields[field])
        return EvaluateConfig(
            data=str(cache / "pictures" / data), out=str(cache / "reports" / out), batch=BATCH, **fields
        )

    lines = {"low": 60, "high": 140}  # as the drawings were made
    image_prompt = {"features": "concepts", "classifier": "concepts"}
    return {
        "concepts": run("seen", "seen", classifier="concepts"),
        "styles": run("seen", "seen", classifier="styles"),
        "colours": run("colours", "colours", classifier="colours"),
        "unseen": run("unseen", "unseen"),
        "pairs": run("pairs", "pairs", judge=str(cache / "runs" / "clip"), count=300),
        "many": run("many", "many", features="concepts"),
        "lineart": run("unseen", "lineart", control="lineart", control_pictures="unseen-lineart", annotator="canny",
                       annotator_options=lines),
        "glyph": run("unseen", "glyph", control="lineart", control_pictures="unseen-glyph", annotator="canny",
                     annotator_options=lines),
        "canny": run("unseen", "canny", control="canny", annotator="canny"),
        "mask": run("unseen", "mask", control="mask", control_pictures="unseen-mask", annotator="mask"),
        "color": run("unseen", "color", control="color", annotator="color"),
        "ip-adapter": run("unseen", "ip-adapter", image_prompt="ip-adapter", **image_prompt),
        "ip-adapter-plus": run("unseen", "ip-adapter-plus", image_prompt="ip-adapter-plus", **image_prompt),
        "other": run("seen", "other", image_prompt="ip-adapter", references="seen-other", image_prompt_scale=0.4,
                     count=100, **image_prompt),
        "other-plus": run("seen", "other-plus", image_prompt="ip-adapter-plus", references="seen-other",
                          image_prompt_scale=0.4, count=100, **image_prompt),
    }  # fmt: skip


def command(config: EvaluateConfig) -> str:
    """What to type for this evaluation."""
    given = config.model_dump(exclude_defaults=True)
    words = ["mahlstick", "evaluate", "--data", given.pop("data")]
    if control := given.pop("control", None):
        words += ["--control", f"{control}@{given.pop('annotator')}"]
    if adapter := given.pop("image_prompt", None):
        scale = given.pop("image_prompt_scale", None)
        words += ["--image-prompt", adapter if scale is None else f"{adapter}:{scale:g}"]
    for name, value in given.pop("annotator_options", {}).items():
        words += ["-o", f"{name}={value}"]
    for name, value in given.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def measure(cache: Path, out: Path, names: list[str] | None = None) -> dict[str, Any]:
    """Run the evaluations, all or those named, and keep their figures in the file ``out`` beside what is there."""
    known, planned = json.loads(out.read_text()) if out.is_file() else {}, runs(cache)
    if unknown := set(names or ()) - set(planned):
        raise MahlstickError(f"--only {min(unknown)}: there is no such evaluation; these are: {', '.join(planned)}")
    loader = Loader()
    for name, config in planned.items():
        if names and name not in names:
            continue
        found = evaluate(config, loader=loader)
        figures = {
            what: {column: round(mean.value, 4) for column, mean in of.items()} for what, of in found.figures.items()
        }
        known[name] = {"pictures": len(found.rows), "command": command(config), **figures}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(known, indent=1) + "\n")
        log.info("%s\n%s", name, "\n".join("  ".join(row) for row in found.table()))
    return known
