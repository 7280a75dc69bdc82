"""What one watches while a run goes on: means for the log, the progress bar, sharpness, curvature and rounding.

Measures, and changes nothing: a run with it and one without end with the same bits.
"""

from .diagnostics import DiagnosticsCallback, WithDiagnostics
from .metrics import RunningMeans, StepClock
from .progress import show


__all__ = ["DiagnosticsCallback", "RunningMeans", "StepClock", "WithDiagnostics", "show"]
