"""Errors that a user can act on: what was found, what was expected, what to do."""


class GenrecError(Exception):
    """Base of every error that genrec raises on purpose; the command line turns it into exit code 2."""


class DataError(GenrecError, ValueError):
    """A catalogue, log, picture or feature file does not hold what it should."""


class ConfigError(GenrecError, ValueError):
    """A recipe or an argument is wrong."""


class ArtefactError(GenrecError, RuntimeError):
    """A run's folder or an export is missing, incomplete or made for something else."""
