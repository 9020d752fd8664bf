"""Configs that come with Fledge, by name: public components of published corpora. They need a network connection.

Here: finding them. The TOML files are beside the other packaged files, in fledge/assets.
"""

from __future__ import annotations

from pathlib import Path

from fledge.core.errors import UsageError
from fledge.core.files import get_asset_path

BUILTIN_CONFIGS = ("world-v2",)


def find_config(name: str) -> Path:
    """A config file, or the packaged one of this name. Raises UsageError where there is neither."""
    if name in BUILTIN_CONFIGS and not Path(name).exists():
        return get_asset_path(f"{name}.toml")
    if Path(name).is_dir():
        raise UsageError(f"{name} is a folder; name the TOML file with the config")
    if not Path(name).is_file():
        known = ", ".join(BUILTIN_CONFIGS)
        raise UsageError(f"there is no config {name}; name a TOML file, or one that comes with Fledge: {known}")
    return Path(name)
