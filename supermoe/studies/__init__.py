"""Comparisons with other ways of learning from the same store."""
