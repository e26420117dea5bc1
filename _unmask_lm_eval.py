"""Puts the model `unmask` into lm-evaluation-harness's table, which knows its own package's models alone.

`unmask_lm_eval.pth`, installed beside this file, has Python call `install` when it starts. So nothing but `sys` is
imported here, not even `__future__`, and nothing here may break Python's start or anybody's import.
"""

import sys

NAME = "unmask"
MODEL = "unmask.evaluation.lm_eval:UnmaskLM"
_MODELS = "lm_eval.models"  # the module that fills the harness's table when it is imported


class UnmaskModelFinder:
    """A finder of `sys.meta_path` that finds one module: the harness's own, to which it adds `register`."""

    def find_spec(self, name, path=None, target=None):
        """Return what the other finders find for the harness's models; None for every other module, or after a failure.

        Only the loader's `exec_module` is another one: it runs the real one and then `register`.
        """
        if name != _MODELS:
            return None
        try:
            others = (finder for finder in sys.meta_path if finder is not self)
            spec = next(found for finder in others if (found := finder.find_spec(name, path, target)) is not None)
            assert spec.loader is not None
            load = spec.loader.exec_module

            def load_and_register(module):
                load(module)
                try:
                    register()
                except Exception:  # a harness of another kind, which will say which models it knows
                    pass

            spec.loader.exec_module = load_and_register
            return spec
        except Exception:  # the import goes on without us
            return None


def install() -> None:
    """Watch for the import of the harness's models, once for each process."""
    if all(type(finder).__name__ != UnmaskModelFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, UnmaskModelFinder())


def register() -> None:
    """Add the model's name to the harness's table; its class, and with it torch, loads when the name is asked for."""
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=MODEL)
