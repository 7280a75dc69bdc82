"""Models whose loss reduces numbers over the processes."""

from __future__ import annotations

import pytest

from tests.ecosystem.detection_cases import CASES  # noqa: F401
from tests.ecosystem.properties import *  # noqa: F403


pytestmark = pytest.mark.distributed
