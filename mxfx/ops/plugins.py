"""Ops and kernels of other packages: modules that installed packages name under the entry-point group ``mxfx.ops``.

Importing such a module defines ops (``mxfx.ops.dialect.define``), describes ops that are not the dialect's
(``mxfx.ops.catalogue.describe``) and registers kernels (``mxfx.ops.providers.kernel``). It is done when ``mxfx.ops`` is
imported, so that a program which calls such an op can be read wherever mxfx is.
"""

from __future__ import annotations

import importlib.metadata

from mxfx.ground.errors import MxfxError

ENTRY_POINT_GROUP = "mxfx.ops"


class PluginError(MxfxError, ImportError):
    """A package names a module of ops that cannot be imported."""


def load_ops() -> None:
    """Import the modules. Raises ``PluginError`` for one that fails."""
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry.load()
        except Exception as error:
            raise PluginError(
                f"entry point {entry.name} = {entry.value} of group {ENTRY_POINT_GROUP} cannot be loaded: "
                f"{type(error).__name__}: {error}; repair or uninstall the package that names it"
            ) from error
