"""``python -m hf_sampa.compare CONFIG.yaml``."""

from . import main


if __name__ == "__main__":
    main()
