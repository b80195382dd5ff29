"""Versions of packages, as artefacts and results record them."""

from importlib import metadata

#: What stands for a package without metadata: mxfx itself where it runs from its sources, a library put on the path.
UNKNOWN = "0+unknown"


def version(name: str) -> str:
    """The installed version of ``name``, or ``UNKNOWN``: a figure or a model is not lost for the want of a label."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return UNKNOWN
