"""``python -m mxfx`` is ``mxfx``."""


def main() -> None:
    """Entry point: ``mxfx.cli.main``, and ctrl-C while that is imported."""
    try:
        from mxfx.cli import main as run
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
