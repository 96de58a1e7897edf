"""``python -m qwenkern`` is the command ``qwenkern``."""

from qwenkern_start import main

if __name__ == "__main__":
    main()
