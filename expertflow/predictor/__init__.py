"""Routing path prediction: which experts the coming tokens will need, known before they are needed."""
