"""How fast, and how exact, the parts of mpiattn are, measured side by side on this machine.

One module for each benchmark, with what it measures beside it:

- `kernel`: the NumPy kernel on one thread; `block`
- `overlap`: how much of a message hides behind compute; `step`
- `error`: whether results are as exact on many ranks as on one; `exactness`
- `attention`: algorithms on all ranks; `contenders`, `quiet`, `torch_parallel`, `torch_flash4`
- `train`: training on all ranks; `train_step`
- `torch_train`: training in torch; `torch_step`, `torch_contenders`, `torch_shares`, `torch_llama`, `torch_parallel`
- `command`: `mpiattn bench`
"""
