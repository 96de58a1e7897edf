"""Other projects' objects, a folder a project: the only code here that knows of them."""
