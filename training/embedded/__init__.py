"""The embedded model: a tiny Stable Diffusion, trained from scratch on emoji art.

Run ``python -m mahlstick.training.embedded --help``.
"""
