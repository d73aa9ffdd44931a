"""Ends of a run that are not bugs."""

RESTART = 75  # EX_TEMPFAIL of sysexits.h: the same command continues


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and how to mend it.

    The command line prints the message and exits with status 2; nothing else in the project
    catches it.
    """


class DiskError(UserError):
    """A disk that is full, read-only, forbidden or gone."""


class Preempted(Exception):
    """The machine is wanted for something else, and all is saved: one line, status RESTART."""
