"""The errors that a command ends with in one line, and the exit codes every command ends with."""

EXIT_DONE = 0
EXIT_USAGE = 2
EXIT_ENVIRONMENT = 3
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request with state saved; a batch script requeues on it


class UserError(Exception):
    """Bad input: the message names the thing and the remedy. Shown without a stack trace."""

    exit_code = EXIT_USAGE


class MachineError(UserError):
    """The machine, not the input, is at fault: a missing GPU, a full disk, an unreachable rank."""

    exit_code = EXIT_ENVIRONMENT


class AlteredError(MachineError):
    """Weights in memory are not what they were, or not the same on all ranks."""
