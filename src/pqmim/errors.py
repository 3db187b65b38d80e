"""Every error that pqmim raises on purpose.

::

    PqmimError
    ├── ImageError                the input cannot be read as an image
    ├── BitstreamError            something is wrong with a .pqm file
    │   ├── NotAPqmFileError      empty, or does not begin with the magic bytes
    │   ├── TruncatedFileError    ends before its fixed fields do
    │   ├── DamagedFileError      checksum, fields or payload do not fit together
    │   ├── UnsupportedFileError  unknown version or flag
    │   ├── TokenCheckError       decoded tokens differ from those that were encoded
    │   └── ModelMismatchError    made with another model
    ├── ModelError                model not found, or its weights file is not usable
    ├── ConfigError               bad setting or YAML
    ├── LimitError                more pixels than allowed
    ├── TargetError               no file as small as asked for is possible
    ├── OutputError               output exists already or cannot be written
    └── MissingExtraError         an optional package is not installed

A message is one line that names the cause and not the file: the caller knows which file it was reading.
Wrong arguments of a function are `ValueError` or `TypeError`, as everywhere in Python.
"""


class PqmimError(Exception):
    """Root of all errors of this package."""


class ImageError(PqmimError):
    """The input cannot be read as an image."""


class BitstreamError(PqmimError):
    """Something is wrong with a .pqm file."""


class NotAPqmFileError(BitstreamError):
    """The data is empty or does not begin with the magic bytes."""


class TruncatedFileError(BitstreamError):
    """The file ends before its fixed fields do."""


class DamagedFileError(BitstreamError):
    """The checksum, the fields or the payload of the file do not fit together."""


class UnsupportedFileError(BitstreamError):
    """The file has a version or a flag that this release does not know."""


class TokenCheckError(BitstreamError):
    """The decoded tokens are not the ones that were encoded."""


class ModelMismatchError(BitstreamError):
    """The file was made with another model than the one at hand."""


class ModelError(PqmimError):
    """A model was not found, or its weights file is damaged or of the wrong kind."""


class ConfigError(PqmimError):
    """A setting or a YAML file is wrong."""


class LimitError(PqmimError):
    """An image has more pixels than allowed."""


class TargetError(PqmimError):
    """No file is as small as the one asked for."""


class OutputError(PqmimError):
    """An output exists already or cannot be written."""


class MissingExtraError(PqmimError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str = "", *, command: str | None = None) -> None:
        install = command or f"pip install 'pqmim[{extra}]'"
        super().__init__(f"the package {package} is not installed; run: {install}")
