"""Configuration of experiments: schema, and merging of files and command line."""

from diffaccel.config.keys import FLAGS, holds_path
from diffaccel.config.loader import (
    EXPERIMENTS,
    as_written,
    base_of,
    experiment_names,
    files_of,
    find,
    is_base,
    load,
    load_tree,
    located,
    parse_overrides,
    portable,
    read,
    to_yaml,
)
from diffaccel.config.schema import KEYS, PARTS, PRECISIONS, STANDARD, TUNABLE, Config, Search, Tradeoff

__all__ = [
    "Config",
    "EXPERIMENTS",
    "FLAGS",
    "KEYS",
    "PARTS",
    "PRECISIONS",
    "STANDARD",
    "Search",
    "TUNABLE",
    "Tradeoff",
    "as_written",
    "base_of",
    "experiment_names",
    "files_of",
    "find",
    "holds_path",
    "is_base",
    "load",
    "load_tree",
    "located",
    "parse_overrides",
    "portable",
    "read",
    "to_yaml",
]
