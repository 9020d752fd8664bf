"""Built-in build configs by name. The TOML files are in fledge/assets.

They read the public components of published corpora, which needs a network connection.
"""

from __future__ import annotations

from pathlib import Path

from fledge.core.errors import UsageError
from fledge.core.files import get_asset_path

BUILTIN_CONFIGS = ("world-v2",)


def find_config(name: str) -> Path:
    """The path of a config file, or of the built-in config with this name. Raises UsageError if there is neither."""
    if name in BUILTIN_CONFIGS and not Path(name).exists():
        return get_asset_path(f"{name}.toml")
    if Path(name).is_dir():
        raise UsageError(f"{name} is a folder; name the TOML file of the config")
    if not Path(name).is_file():
        builtin = ", ".join(BUILTIN_CONFIGS)
        raise UsageError(f"there is no config {name}; name a TOML file or a built-in config: {builtin}")
    return Path(name)
