"""The one exception that means "the user can mend this": one clear line, exit code 2, no traceback.

    raise UserError(f"{path}: no such folder. Pass the folder that holds 'images/' with --data_dir.")

`tools.cli.run` turns it into that line. Anything else that escapes a script is our fault and keeps its traceback.
"""

import importlib
from types import ModuleType


class UserError(Exception):
    """A mistake of the user's. The message names the file or flag, and the remedy."""


class FileError(UserError):
    """A file of one image cannot be used; the other images do not need it (`tools.left_out`)."""


class Incomplete(UserError):
    """All is done but the images that were left out: exit code 3."""


def require(name: str, package: str) -> ModuleType:
    """Import an optional module (UserError: not installed; `package` is what pip calls it)."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name}: not installed. Run: pip install {package}") from error
