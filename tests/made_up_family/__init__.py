"""A family that is not part of the package: what `CONTRIBUTING.md` ("Adding a family") asks for, and nothing else."""
