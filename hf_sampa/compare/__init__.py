"""Comparisons of methods: runs of one script with several methods, tasks and seeds, and what can be said of them.

``python -m hf_sampa.compare CONFIG.yaml`` does all of it; see `hf_sampa.compare.config` for what such a file says.
"""

from .command import main


__all__ = ["main"]
