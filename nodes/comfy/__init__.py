"""What ComfyUI writes: workflows as JSON, in pictures, and packs of nodes."""
