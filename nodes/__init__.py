"""Workflows: ComfyUI's graphs on diffusers, as JSON, as Python, as a server.

Every node is here under its ComfyUI name and may be called from Python: ``nodes.EmptyLatentImage(width=512)`` returns
its outputs as a tuple.
"""
