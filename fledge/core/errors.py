"""Every error that a user can cause or see, in one tree.

    FledgeError                 base class; the CLI prints it as one line and exits with `exit_code`
    ├── UsageError              an argument or option has an invalid value
    ├── ConfigError             a configuration has an unknown key or an invalid value
    ├── CheckpointError         a file is missing, damaged, incomplete or of another type than it claims
    │   └── UnsupportedError    a file is valid but holds something Fledge does not run (RWKV-7, for example)
    ├── TokenizerError          a vocabulary is malformed, or a token id is out of range
    ├── DataError               a corpus file, token store or build folder is damaged or of another type than it claims
    ├── StateError              a state does not fit the model
    ├── BackendError            a kernel backend is not available
    └── TrainingError           a training run cannot continue

A message names the problem, the value and the next step. Programmer errors are plain asserts.
"""

from __future__ import annotations


class FledgeError(Exception):
    """Base of all errors that are meant for the user."""

    exit_code = 1


class UsageError(FledgeError):
    """An argument or option has an invalid value."""

    exit_code = 2


class ConfigError(FledgeError):
    """A configuration has an unknown key or an invalid value."""


class CheckpointError(FledgeError):
    """A checkpoint file is missing, damaged, incomplete, or of another type than it claims."""


class UnsupportedError(CheckpointError):
    """A file is valid, but holds something Fledge does not run."""


class TokenizerError(FledgeError):
    """A vocabulary is malformed, or a token id is out of range."""


class DataError(FledgeError):
    """A corpus file, token store or build folder is damaged, of another type than it claims, or cannot be written."""


class StateError(FledgeError):
    """A state does not fit the model."""


class BackendError(FledgeError):
    """A kernel backend is unknown, or not available on this machine."""


class TrainingError(FledgeError):
    """A training run cannot continue, for example because its numbers are not finite."""
