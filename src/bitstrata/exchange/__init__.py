"""Other programs' files, both ways: `export_model` and `import_model`."""

from .exporting import export_model
from .importing import import_model
from .result import Export, Import

__all__ = ["Export", "Import", "export_model", "import_model"]
