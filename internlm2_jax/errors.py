"""The one exception that means "the person at the keyboard can mend this"."""


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and how to mend it.

    The command line prints the message and exits with status 2; nothing else in the project
    catches it.
    """
