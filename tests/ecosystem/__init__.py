"""Trainers of other libraries under the mixin: every case is put through the same tests, see `properties`."""

import pytest


# The tests that the cases share are imported from a module that pytest does not take for one of tests.
pytest.register_assert_rewrite("tests.ecosystem.properties")
