"""Experiments: the schema of their keys, and how files and command line are merged."""

from diffaccel.config.loader import EXPERIMENTS, as_written, find, holds_path, load, parse_overrides, read, to_yaml
from diffaccel.config.schema import FLAGS, KEYS, PATHS, PRECISIONS, TEXTS, TUNABLE, Config, Search, Tradeoff

__all__ = [
    "Config",
    "EXPERIMENTS",
    "FLAGS",
    "KEYS",
    "PATHS",
    "PRECISIONS",
    "Search",
    "TEXTS",
    "TUNABLE",
    "Tradeoff",
    "as_written",
    "find",
    "holds_path",
    "load",
    "parse_overrides",
    "read",
    "to_yaml",
]
