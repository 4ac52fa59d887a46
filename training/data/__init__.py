"""From sources to rows, from rows to ids and batches."""
