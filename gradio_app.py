"""The web page as a plain script: ``python gradio_app.py``, or ``mahlstick app`` once installed."""

from __future__ import annotations

from mahlstick.page.app import build, main

__all__ = ["build", "main"]

if __name__ == "__main__":
    main()
