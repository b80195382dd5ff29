"""``python -m mxfx`` is ``mxfx``."""

from mxfx.cli import main

if __name__ == "__main__":
    main()
