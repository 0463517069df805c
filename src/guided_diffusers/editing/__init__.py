"""Edits of pictures and arrays in files, one or a folder of them, by the pipeline's `edit`."""

from typing import TYPE_CHECKING

from ..lazy import lazy_imports

if TYPE_CHECKING:
    from .folder import describe, edit_folder, titles
    from .pictures import comparison

__all__ = ["comparison", "describe", "edit_folder", "titles"]

__getattr__, __dir__ = lazy_imports(__name__)
