"""One file per method: its config, its mathematics, and the handlers that register it.

Every file of the folder is imported, so a new method needs no line elsewhere: `mmskip` exports the configs that are
registered.
"""

import importlib
import pkgutil

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
