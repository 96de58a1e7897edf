"""Doors into other projects, each in a file named after one: the only code here that knows of them."""
