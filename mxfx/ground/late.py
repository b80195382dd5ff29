"""Imports that wait until something needs them.

The options and the contract of a pass are plain Python; what its body calls imports torch, which takes over a second.
``config show`` and every refusal read the first and need nothing of the second, so the command line puts the imports of
the bodies off, as ``lazy import`` (PEP 810) does in Python 3.15. Only the command line does: to a library, and to
tests, an import is an import.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

_import = builtins.__import__


class _Statement(NamedTuple):
    """An import that waits: of ``module``, into ``namespace``."""

    namespace: dict[str, Any]
    module: str
    names: tuple[str, ...]


class Later:
    """Stands for ``module``, or for ``name`` of it, where that was imported; once used, it is what it stands for."""

    def __init__(self, imports: LateImports, module: str, name: str = "") -> None:
        self._imports, self._module, self._name = imports, module, name

    def _real(self) -> Any:
        self._imports.finish()
        module = _import(self._module, None, None, (self._name,) if self._name else ("*",), 0)
        return getattr(module, self._name) if self._name else module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)

    def __mro_entries__(self, bases: tuple[object, ...]) -> tuple[Any, ...]:
        return (self._real(),)


class _Source:
    """What ``from module import name`` takes its names from."""

    def __init__(self, imports: LateImports, module: str) -> None:
        self._imports, self._module = imports, module

    def __getattr__(self, name: str) -> Later:
        return Later(self._imports, self._module, name)


class LateImports:
    """Puts off what the modules of ``rooms`` import of ``heavy`` packages, at their top, until any other module imports
    one of these, or one is used.

    All of it is then imported at once, room by room in their order; from there on every import is as ever.
    """

    def __init__(self, rooms: Sequence[str], heavy: Sequence[str]) -> None:
        self._rooms, self._heavy = rooms, heavy
        self._waiting: list[_Statement] = []

    def install(self) -> None:
        """Begin, unless torch is there already: then there is nothing to save."""
        if not any(name in sys.modules for name in self._heavy):
            builtins.__import__ = self._late_import

    def finish(self) -> None:
        """Import everything that waits and put it where its names stand."""
        builtins.__import__ = _import
        waiting, self._waiting = self._waiting, []
        for room in self._rooms:
            for namespace, module, names in waiting:
                if _within(namespace["__name__"], room):
                    _import(module, namespace, None, names, 0)
                    _fill_in(namespace, module)

    def _late_import(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        if level or not any(_within(name, heavy) for heavy in self._heavy):
            return _import(name, globals, locals, fromlist or (), level)
        if globals is None or globals is not locals or not self._is_late(globals["__name__"]):
            self.finish()
            return _import(name, globals, locals, fromlist or (), level)
        self._waiting.append(_Statement(cast(dict[str, Any], globals), name, tuple(fromlist or ())))
        return _Source(self, name) if fromlist else Later(self, name)

    def _is_late(self, importer: str) -> bool:
        return any(_within(importer, room) for room in self._rooms)


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _fill_in(namespace: dict[str, Any], module: str) -> None:
    for name, value in namespace.items():
        if isinstance(value, Later) and value._module == module:
            namespace[name] = value._real()
