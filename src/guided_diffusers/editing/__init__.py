"""Pictures and arrays in files, edited: one, or a folder of them; the maps are in `edits` and the pipeline."""

from typing import TYPE_CHECKING

from ..lazy import lazy_imports

if TYPE_CHECKING:
    from .folder import describe, edit_folder, titles
    from .pictures import comparison

__all__ = ["comparison", "describe", "edit_folder", "titles"]

__getattr__, __dir__ = lazy_imports(__name__)
