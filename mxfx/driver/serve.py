"""``mxfx serve``: an emitted model behind transformers' own server."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from mxfx.driver.options import check_device
from mxfx.driver.pretrained import ModelError

_NEEDS = ("fastapi", "uvicorn", "openai", "pydantic")


def serve(folder: Path, *, host: str = "127.0.0.1", port: int = 8000, device: str = "cpu") -> None:
    """Serve until interrupted.

    Raises ``ConfigError`` for a device that is not there, ``ModelError`` for a folder that holds no emitted model, or a
    missing package.
    """
    server(folder, host=host, port=port, device=device, background=False)


def server(folder: Path, *, host: str, port: int, device: str, background: bool) -> object:
    """transformers' server with the model in memory; in a thread of its own where ``background``."""
    check_device(device)
    missing = [name for name in _NEEDS if find_spec(name) is None]
    if missing:
        raise ModelError(f"serving needs the package {missing[0]}: pip install 'mxfx[serve]'")
    from mxfx.export.folder import is_folder, register

    if not is_folder(folder):
        raise ModelError(f"{folder} holds no emitted model; give the folder that `mxfx run --out` wrote")
    register()
    from transformers.cli.serve import Serve

    from mxfx.driver.protocol import completed

    with completed(folder):
        return Serve(
            force_model=str(folder),
            device=device,
            host=host,
            port=port,
            non_blocking=background,
            reasoning="auto",
        )
