"""How the ops are computed, tile by tile, on a `Backend` object. `textbook` says what is computed.

geometry      window arithmetic, integers only
im2col        im2col and col2im, padding modes and their adjoints
correlate     the three products of convolution
pooling       running reductions and their adjoints
arguments     the arguments of attention in the form that tiles use
visibility    which query sees which key: masks, bands, lengths
softmax       scores, softmax, weighted sum, and the way back
projections   the linear maps around the heads
nan_safe      products in which what is hidden stays hidden
"""
