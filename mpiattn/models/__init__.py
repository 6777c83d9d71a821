"""Models on distributed attention, in NumPy and CuPy: layers with hand-written gradients, Llama, generation.

- `layers`: each formula forward and backward
- `llama`: the model; `config`: its sizes
- `attention_layer`: attention with its projections, for any algorithm, and a whole sequence in and out
- `model`: weights and tokenizer from a Hugging Face folder or a GGUF file; `folder`, `gguf`, `tokenizer` read these
- `generation`: text, its `cache` spread over the ranks
"""
