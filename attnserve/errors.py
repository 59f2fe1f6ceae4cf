"""What the commands refuse."""


class UserError(ValueError):
    """One line for the user: what is wrong, and what to do.

    Whatever reads a command's options, or the files and folders that they name, may raise it, and
    does so before any long work.
    """
