"""What is around a script's `main`: an error that is the user's is one message, and processes end in good order."""

from __future__ import annotations

from collections.abc import Callable

from ..distributed import close_groups


def run_main(main: Callable[[], object]) -> None:
    """Run a script's `main`, at the end of the script: ``if __name__ == "__main__": run_main(main)``."""
    main()
    close_groups()  # before the interpreter ends
