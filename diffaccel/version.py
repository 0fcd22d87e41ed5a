"""Version of the package, which points and files of weights record."""

__version__ = "0.2.0"
