"""``python -m qwenkern`` is ``qwenkern``, but for Ctrl-C in its first second: Python imports the package before."""

from .cli.commands import main

if __name__ == "__main__":
    main()
