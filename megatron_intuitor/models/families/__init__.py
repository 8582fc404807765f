"""The supported model families, one declarative file each."""
