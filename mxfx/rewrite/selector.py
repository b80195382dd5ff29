"""Which part of a model a pass or a rule speaks of."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Selector:
    """A regular expression that a whole module path must match (``re.fullmatch``).

    Raises ``ValueError`` for an expression that does not compile.
    """

    pattern: str = r".*"

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"{self.pattern!r} is no regular expression: {error.msg} at position {error.pos}"
            ) from error

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        return re.compile(self.pattern)

    def __call__(self, path: str) -> bool:
        return self._regex.fullmatch(path) is not None

    def __str__(self) -> str:
        return self.pattern


ALL = Selector()
