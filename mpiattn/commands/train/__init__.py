"""Train a model on a text, its sequences spread over the ranks."""
