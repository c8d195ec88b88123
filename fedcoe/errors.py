"""The one exception a user sees: a sentence saying what is wrong, where, and what to do."""


class FedCoEError(Exception):
    """A mistake or a lack the user can mend. Faces print it as one line and exit with 2."""
