"""What is saved and how a run goes on: which files, in which order, and how whole ones are told from torn ones.

`checkpoint.py` says what is written.
"""

from .resume import ResumeMixin


__all__ = ["ResumeMixin"]
