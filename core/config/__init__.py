"""Settings: the schema, where values come from, what cannot work together, the file, and other tools' configurations.

Way in: `schema.Config`; `settings.load` puts a configuration together, `check.check` returns every problem of it at
once, `file` edits a `distui.toml`, `export` and `imports/` speak DeepSpeed's and Accelerate's formats. Torch-free;
knows hardware as facts, and of backends only their names and limits, never their code.
"""

from distui.core.config.schema import Config

__all__ = ["Config"]
