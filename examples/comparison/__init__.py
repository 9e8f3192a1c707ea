"""The four experiments of `attention_vs_convolution.py`, one a module: `run` it, its `findings`, and `draw` them."""
