"""What every service and command may end with before it has begun: imported everywhere, so it imports nothing."""


class StartupError(Exception):
    """The service cannot start; the message is one line for the person who started it."""
