"""Programs on disk: mxfx's own artefact, and checkpoints that other systems load."""
