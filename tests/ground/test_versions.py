import importlib.metadata

from mxfx.ground.versions import UNKNOWN, version


def test_a_package_without_metadata_has_a_label_and_stops_nothing():
    assert version("torch") == importlib.metadata.version("torch")
    assert version("no-such-package-of-mxfx") == UNKNOWN
