"""Generate text with a model whose cache is spread over the ranks."""
