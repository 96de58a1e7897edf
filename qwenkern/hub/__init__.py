"""From what a person calls a model to its files on this machine."""
