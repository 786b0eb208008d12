"""NumPy's files, whose own error for a file of another kind advises to unpickle it."""


def why_unreadable(error: Exception) -> str:
    """What `np.load(..., allow_pickle=False)` found, without advice to run code of a file."""
    text = str(error)
    return "it is not a NumPy file of numbers" if "pickle" in text.lower() else text
