"""From a log to packed batches."""
