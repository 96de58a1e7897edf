"""Finds a model's files on this machine from its name, and downloads them if they are missing."""
