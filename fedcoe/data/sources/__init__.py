"""Where datasets come from: one module a family.

A module here that has `NAMES: tuple[str, ...]` and
`build(name: str, download_dir: Path, *, check_md5: bool = True) -> RawDataset` adds those names
to `fedcoe fetch`; there is no list to extend.
"""

import functools
import importlib
import pkgutil
from types import ModuleType


@functools.cache
def sources() -> dict[str, ModuleType]:
    """Every dataset that can be fetched by name, and the module that builds it."""
    modules = [
        importlib.import_module(f"{__name__}.{module.name}")
        for module in pkgutil.iter_modules(__path__)
    ]
    named = {name: module for module in modules for name in getattr(module, "NAMES", ())}
    return dict(sorted(named.items()))
