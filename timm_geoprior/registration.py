"""Registration in timm's registry, at once or as soon as timm is imported.

timm and torch take seconds to import, and neither `timm-geoprior --help` nor a process that never uses timm needs them.
"""
import sys
from importlib import import_module

TYPE_CHECKING = False  # importing `typing` would take half of this package's import time
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

# modules that can be imported without timm; before any other, timm is imported, and the models with it
_WITHOUT_TIMM = {f'{__package__}.{name}' for name in (
    '__main__', 'cli', 'data', 'data.reading', 'errors', 'evaluation', 'evaluation.validate', 'files', 'inference',
    'inference.inputs', 'pretrained', 'pretrained.manifest', 'progress', 'release', 'release.publish', 'training',
    'training.recipe', 'training.train')}


class _RegisteringLoader:
    """Wraps timm's own loader to register the models once timm is loaded."""

    def __init__(self, loader: 'Any') -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> 'Any':
        return getattr(self.loader, name)

    def exec_module(self, module: 'ModuleType') -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        import_module('.geoprior_resnet', __package__)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]


class _LoadedModule:
    """Loader of a module that was imported while its spec was being looked up."""

    def __init__(self, module: 'ModuleType') -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: 'ModuleSpec') -> 'ModuleType':
        return self.module

    def exec_module(self, module: 'ModuleType') -> None:
        module.__spec__ = self.spec


class _Finder:
    """Stays on `sys.meta_path` until timm is imported."""

    def find_spec(
            self, name: str, path: 'Sequence[str] | None' = None,
            target: 'ModuleType | None' = None) -> 'ModuleSpec | None':
        if name == 'timm':
            return self._find_timm(name, path, target)
        if name.startswith(f'{__package__}.') and name not in _WITHOUT_TIMM and 'timm' not in sys.modules:
            # before the module runs, since timm's import would otherwise need it while it is half initialized
            import_module('timm')
            if name in sys.modules:
                from importlib.machinery import ModuleSpec
                module = sys.modules[name]
                # importlib prefers the spec of a module that appeared in the meantime, and would load it a second time
                module.__spec__ = ModuleSpec(name, _LoadedModule(module))  # type: ignore[arg-type]
                return module.__spec__
        return None

    def _find_timm(self, *args: 'Any') -> 'ModuleSpec | None':
        # only finders after this one: an earlier one may call all the others in turn, as this one does
        for finder in sys.meta_path[sys.meta_path.index(self) + 1:]:
            spec = finder.find_spec(*args)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RegisteringLoader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


def register_with_timm() -> None:
    """Register the models: now if timm is already imported, else right after its import."""
    if 'timm' in sys.modules:
        import_module('.geoprior_resnet', __package__)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
