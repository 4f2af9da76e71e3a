"""Sampling as ComfyUI samples: schedules of noise, samplers as plain functions, and the denoiser that they call."""
