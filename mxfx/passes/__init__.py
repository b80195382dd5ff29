"""All passes, one file each: a file that is here is a pass, ``fuse_norm.py`` the pass ``fuse-norm``.

``load_all`` imports, and so registers, every one of them; ``from mxfx.passes import FuseNorm`` imports that one alone.
"""

from __future__ import annotations

import re
from importlib import import_module
from pkgutil import iter_modules

from mxfx.rewrite import Pass, register


def load_all() -> None:
    """Import and register every pass of mxfx, so that ``find_pass`` knows it."""
    for name in _files():
        module = import_module(f"{__name__}.{name}")
        for found in vars(module).values():
            if isinstance(found, type) and issubclass(found, Pass) and found.__module__ == module.__name__:
                register(found)


def _files() -> list[str]:
    return sorted(module.name for module in iter_modules(__path__))


def __getattr__(name: str) -> object:
    """A pass by the name of its class, or what stands beside one in its file (``Rule`` of ``annotate``)."""
    own = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    files = _files()
    for file in [own] if own in files else files:
        found = getattr(import_module(f"{__name__}.{file}"), name, None)
        if found is not None:
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
