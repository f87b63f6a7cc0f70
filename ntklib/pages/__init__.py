"""Pages of the book that are generated: the ledger, the index of figures, the parts of the front page."""
