"""What the tests are worth: one operator, constant or line of the package is changed at a time, and the tests have to notice.

python -m tests.mutation --help
"""
