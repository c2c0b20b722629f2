"""In a checkout the folders of the top level can be imported by their own names too: the same modules, not copies."""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _SameModule(Loader):
    """Gives the module `monarchrt.NAME` to who imports NAME."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"monarchrt.{spec.name}")
        self.own = module.__spec__  # the import machinery puts the other name's there
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.own


class _Finder(MetaPathFinder):
    def __init__(self, names: set[str]):
        self.names = names

    def find_spec(self, name, path=None, target=None) -> ModuleSpec | None:
        top, _, rest = name.partition(".")
        same = top in self.names and rest != "__main__"  # `python -m train` runs a file
        return ModuleSpec(name, _SameModule()) if same else None


_FINDER = _Finder(set())


def same_as_in_monarchrt(name: str) -> None:
    """Makes NAME and all modules in it those of `monarchrt.NAME`.

    Args:
        name: "models", "train", "pallas_kernels" or "triton_kernels", of which NAME/__init__.py is being run.
    """
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    _FINDER.names.add(name)
    sys.modules[name] = importlib.import_module(f"monarchrt.{name}")
