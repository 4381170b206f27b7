"""What goes wrong for reasons a user can mend. A message says what, where, what was found and what would do."""


class GroupwiseError(Exception):
    """Base of every error that is shown to a user as one paragraph, without a traceback (exit status 2)."""


class ConfigError(GroupwiseError):
    """A job that cannot be run as written: an unknown key, a wrong type, an impossible combination."""


class ObjectiveError(ConfigError, ValueError):
    """An objective that cannot be computed: an unknown choice, impossible combination, or tensors that do not fit."""


class DataError(GroupwiseError):
    """Prompts that cannot be read or used: a missing file, a broken line, a row without a prompt."""


class ModelError(GroupwiseError):
    """A model or tokenizer that cannot be loaded, or that does not do what training needs."""


class RewardError(GroupwiseError):
    """A reward function that cannot be loaded, or whose values cannot be used."""


class RunFolderError(GroupwiseError):
    """A run folder that exists, is locked, is damaged or cannot be written."""


class Stopped(SystemExit):
    """The end of the process that a signal asks for, wherever it is; no answer of the function that was running."""
