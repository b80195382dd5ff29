"""The programs that these tests look at."""

from tests.stages import program

__all__ = ["program"]
