"""One package under two names.

In a clone, `datamodules` and `callbacks` lie at the top level, and installed they are `fedl2p.datamodules` and
`fedl2p.callbacks`. Python would load a file once for each name, and the two classes of one name would not be the same
class. So the top-level names are aliases: whatever is imported below them is the module of the package `fedl2p`.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


class _AliasFinder(MetaPathFinder, Loader):
    """Answers imports below `alias` with the modules below `package`."""

    def __init__(self, alias: str, package: str) -> None:
        self.alias = alias
        self.package = package

    def _real_name(self, name: str) -> str:
        return self.package + name.removeprefix(self.alias)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{self.alias}.") or find_spec(self._real_name(fullname)) is None:
            return None
        return ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        # The import system returns what it finds here afterwards, not the empty module that it has made.
        sys.modules[module.__name__] = import_module(self._real_name(module.__name__))


def make_alias(alias: str, package: str) -> None:
    """Makes a top-level package another name of a package: the same modules, the same objects.

    To be called by the top-level package while it is imported, once.

    Args:
        alias: name of the top-level package, `datamodules`.
        package: name of the package that it stands for, `fedl2p.datamodules`.
    """
    sys.modules[alias] = import_module(package)
    sys.meta_path.insert(0, _AliasFinder(alias, package))
