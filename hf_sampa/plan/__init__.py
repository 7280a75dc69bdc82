"""What to expect of a run before it is started: processes, roles, mesh and memory, and how to start it. Nothing is loaded or trained: a model's numbers come from its configuration."""

from .command import plan


__all__ = ["plan"]
