"""One embedding per user for every task: a mixture-of-experts transformer over event logs."""

__version__ = "0.1.0"
