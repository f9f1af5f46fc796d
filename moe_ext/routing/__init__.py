"""Routing: from logits to the experts of each token, their weights and who is dropped."""
