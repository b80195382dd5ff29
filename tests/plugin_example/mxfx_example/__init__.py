"""A pass for mxfx in a package of its own."""
