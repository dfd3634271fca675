"""The one place of the version: the build reads it here, and tests compare the pages that name it."""

__version__ = "0.2.0"
