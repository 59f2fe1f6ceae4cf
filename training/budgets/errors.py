"""What a search for budgets refuses."""


class Refusal(ValueError):
    """What was asked for cannot be done; the message says what to do."""
