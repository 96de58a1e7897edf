"""What touches another project's objects, one file a project. Model imports these when they are asked for."""
