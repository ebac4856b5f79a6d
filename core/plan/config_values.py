"""The values of a Hugging Face config.json, read under any of the names that families of models use. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distui.core.errors import UserError


class Values:
    """The values of a config.json under any of the names that families use."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values, self.source = values, source

    def size(self, *keys: str, default: int | None = None) -> int:
        """Return the first whole number among `keys`, else the default.

        Raises: UserError where there is none, or it is not positive.
        """
        for key in keys:
            found = self.values.get(key)
            if found is None:
                continue
            if isinstance(found, bool) or not isinstance(found, (int, float)) or found != int(found) or found < 0:
                raise UserError(
                    f"the model config {self.source} has {key} = {found!r}",
                    "it must be a whole number, not negative",
                    "correct the file, or give a parameter count such as 7B",
                )
            return int(found)
        if default is None:
            raise UserError(
                f"the model config {self.source} lacks {keys[0]}",
                f"none of {', '.join(keys)} is in it",
                "give the config.json of a transformer, or a parameter count such as 7B",
            )
        return default

    def flag(self, key: str, default: bool = False) -> bool:
        """Return a switch."""
        found = self.values.get(key)
        return default if found is None else bool(found)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value as it stands."""
        found = self.values.get(key)
        return default if found is None else found
