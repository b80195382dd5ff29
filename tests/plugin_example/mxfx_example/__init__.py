"""An op with a kernel, and passes for it, for mxfx in a package of its own."""
