"""mxfx: a torch.fx compiler that rewrites Hugging Face causal LMs into Microscaling (MX) formats.

``trace``, ``load_pipeline``, ``compile``, ``run``, ``load``, ``as_causal_lm``, ``Pipeline`` are loaded on first use, so
that ``import mxfx.formats`` alone stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mxfx.api import check, compile, load, load_pipeline, run
    from mxfx.config import Pipeline
    from mxfx.graph.trace import trace
    from mxfx.runtime.causal_lm import as_causal_lm

_HOME = {
    "trace": "mxfx.graph.trace",
    "Pipeline": "mxfx.config",
    "as_causal_lm": "mxfx.runtime.causal_lm",
    **dict.fromkeys(("check", "compile", "load", "load_pipeline", "run"), "mxfx.api"),
}

__all__ = ["Pipeline", "as_causal_lm", "check", "compile", "load", "load_pipeline", "run", "trace"]


#: Module of transformers → the module of ours that registers emitted models there.
_REGISTERED_AT = {
    "transformers.models.auto.configuration_auto": "mxfx.export.folder_config",
    "transformers.models.auto.modeling_auto": "mxfx.export.folder",
}


def _register_with_transformers() -> None:
    """``AutoModelForCausalLM.from_pretrained(DIR)`` opens emitted models: at once where transformers is there already,
    else right after it is imported, so that ``import mxfx`` stays light.
    """
    import sys
    from importlib import import_module
    from importlib.util import find_spec

    from mxfx.ground.garbage import uncollected

    waiting = {theirs for theirs in _REGISTERED_AT if theirs not in sys.modules}
    for theirs in _REGISTERED_AT:
        if theirs not in waiting:
            import_module(_REGISTERED_AT[theirs]).register()

    class Finder:
        """Lets a module be found as ever, and registers once it has run."""

        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> object:
            if name not in waiting:
                return None
            waiting.remove(name)
            spec = find_spec(name)
            if spec is None or spec.loader is None:
                return spec
            execute = spec.loader.exec_module

            def then_register(module: object) -> None:
                execute(module)  # type: ignore[arg-type]
                with uncollected():
                    import_module(_REGISTERED_AT[name]).register()

            spec.loader.exec_module = then_register  # type: ignore[method-assign]
            return spec

    if waiting:
        sys.meta_path.insert(0, Finder)  # type: ignore[arg-type]


_register_with_transformers()


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'mxfx' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
