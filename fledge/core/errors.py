"""Every error a user can cause or meet, in one tree.

    FledgeError                 anything below; the CLI prints it as one line and exits with `exit_code`
    ├── UsageError              an argument or option has a value we cannot take
    ├── ConfigError             a configuration has an unknown key or an impossible value
    ├── CheckpointError         a file is missing, damaged, incomplete or not what it says it is
    │   └── UnsupportedError    a file is fine but holds something Fledge does not run (RWKV-7, say)
    ├── TokenizerError          a vocabulary is malformed, or an id lies outside it
    ├── DataError               a corpus file, token store or build folder is damaged, or not what it says it is
    ├── StateError              a state does not fit the model it is given to
    ├── BackendError            a kernel backend is not available here
    └── TrainingError           a training run cannot go on

A message names what was wrong, the value, and the next step. Programmer errors are plain asserts, not these.
"""

from __future__ import annotations


class FledgeError(Exception):
    """Base of all errors that are meant for the person at the keyboard."""

    exit_code = 1


class UsageError(FledgeError):
    """An argument or option has a value we cannot take."""

    exit_code = 2


class ConfigError(FledgeError):
    """A configuration has an unknown key or an impossible value."""


class CheckpointError(FledgeError):
    """A checkpoint file is missing, damaged, incomplete, or not what it says it is."""


class UnsupportedError(CheckpointError):
    """A file is fine, but holds something Fledge does not run."""


class TokenizerError(FledgeError):
    """A vocabulary is malformed, or a token id lies outside it."""


class DataError(FledgeError):
    """A corpus file, token store or build folder is damaged, not what it says it is, or cannot be written."""


class StateError(FledgeError):
    """A state does not fit the model it is given to."""


class BackendError(FledgeError):
    """A kernel backend is unknown, or not available on this machine."""


class TrainingError(FledgeError):
    """A training run cannot go on: its numbers are no longer finite, say."""
