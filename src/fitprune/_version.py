"""The version, alone, so that whatever records it need not import the package's public names."""

__version__ = "0.1.0"
