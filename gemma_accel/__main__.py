"""``python -m gemma_accel`` is ``gemma-accel``."""

from gemma_accel.cli import main

if __name__ == "__main__":
    main()
