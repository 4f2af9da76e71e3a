"""Schedulers by diffusers' class names and by the short names that other front ends use."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from mahlstick.errors import MahlstickError

_MULTISTEP = "DPMSolverMultistepScheduler"
_SINGLESTEP = "DPMSolverSinglestepScheduler"

# short name -> (diffusers' class, the config that makes the class that sampler)
TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpm++_2m": (_MULTISTEP, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpm++_2m_sde": (_MULTISTEP, {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "dpm++_3m_sde": (_MULTISTEP, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    "dpm++_2s": (_SINGLESTEP, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpm++_sde": (_SINGLESTEP, {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "tcd": ("TCDScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}

# suffix -> the config entry it switches on
SPACINGS = {
    "karras": ("use_karras_sigmas", True),
    "exponential": ("use_exponential_sigmas", True),
    "beta": ("use_beta_sigmas", True),
    "trailing": ("timestep_spacing", "trailing"),
}

_CLASSES = sorted({class_name for class_name, _ in TABLE.values()})
_SPELLINGS = (("dpmpp", "dpm++"), ("uni_pc", "unipc"), ("_ancestral", "_a"), ("k_", ""), ("_discrete", ""))


def names() -> list[str]:
    """Every short name, without the suffixes ``_karras``, ``_exponential``, ``_beta`` and ``_trailing``."""
    return sorted(TABLE)


def _normalise(name: str) -> str:
    key = "_".join(name.strip().lower().replace("-", " ").replace("_", " ").split())
    for foreign, ours in _SPELLINGS:
        key = key.removeprefix(foreign) if foreign == "k_" else key.replace(foreign, ours)
    return key


def resolve(name: str) -> tuple[str, dict[str, Any]]:
    """(diffusers' class name, config overrides) for a name such as ``"DPM++ 2M Karras"`` or ``"DDIMScheduler"``.

    Raises :class:`MahlstickError` with the closest names where the name is unknown.
    """
    if name in _CLASSES:
        return name, {}
    key, spacing = _normalise(name), None
    if key not in TABLE and "_" in key:
        stem, suffix = key.rsplit("_", 1)
        if suffix in SPACINGS:
            key, spacing = stem, suffix
    if key not in TABLE:
        close = difflib.get_close_matches(key, names(), n=3) or difflib.get_close_matches(name, _CLASSES, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(names())}"
        raise MahlstickError(f"scheduler {name!r} is unknown; {hint}")
    class_name, options = TABLE[key]
    # A base whose config already chooses one spacing of the noise levels would clash with another.
    spacings: dict[str, Any] = {entry: False for entry, value in SPACINGS.values() if value is True}
    if spacing is not None:
        entry, value = SPACINGS[spacing]
        spacings[entry] = value
    return class_name, {**options, **spacings}


def build(name: str | None, scheduler: Any) -> Any:
    """A fresh scheduler with the config (betas, prediction type, ...) of a pipeline's ``scheduler``.

    ``name`` is one that :func:`resolve` knows, or None for the same class again. Raises :class:`MahlstickError`
    for an unknown name, and where the class has no such spacing of noise levels.
    """
    import diffusers

    if name is None:
        return type(scheduler).from_config(scheduler.config)
    class_name, overrides = resolve(name)
    scheduler_class = getattr(diffusers, class_name)
    accepted = inspect.signature(scheduler_class.__init__).parameters
    refused = [entry for entry, value in overrides.items() if value and entry not in accepted]
    if refused:
        raise MahlstickError(f"scheduler {name!r}: {class_name} has no {refused[0]}; drop the suffix")
    overrides = {entry: value for entry, value in overrides.items() if entry in accepted}
    return scheduler_class.from_config(scheduler.config, **overrides)


def check_steps(scheduler: Any, steps: int) -> None:
    """Raises :class:`MahlstickError` where ``scheduler`` has no ``steps`` steps; it is not fit for use afterwards."""
    name = type(scheduler).__name__
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, IndexError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise MahlstickError(f"steps: {steps} do not do for {name} ({reason[:200]})") from error
    # With leading spacing and an offset the first of 1000 steps would lie behind the last that was trained.
    last = scheduler.config.num_train_timesteps - 1
    if float(scheduler.timesteps.max()) > last:
        raise MahlstickError(f"steps: {steps} are too many for {name}; take at most {last}")
