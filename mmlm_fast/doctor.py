"""What is installed, and which path each op takes on this machine."""


def doctor() -> str:
    return ""
