"""What a forward pass keeps for its backward pass: an estimate, from the shape of the model.

Korthikanti et al. 2022, Reducing Activation Recomputation in Large Transformer Models, arXiv 2205.05198, equation 1: with b samples of
s tokens, h numbers per token and a heads, a layer keeps s b h (34 + 5 a s / h) bytes in 16 bits. Of the 34, attention has 11, a
feed-forward part of width 4 h has 19, and the two norms have 4; here they are counted one by one, for other widths, gates and
precisions. The second term is the matrix of attention, which newer kernels do not keep.
"""

from __future__ import annotations

from .model_size import Shape


SINGLE, HALF = 4, 2


def activation_bytes(shape: Shape, batch: int, tokens: int, *, bf16: bool, checkpointing: bool) -> int:
    """Bytes that one pass keeps.

    Args:
        shape: of the model.
        batch: samples per pass and device, b.
        tokens: per sample, s.
        bf16: whether matrices are multiplied in 16 bits; norms are not.
        checkpointing: whether only the layers' inputs are kept, and one layer at a time is computed again (section 5: 2 s b h
            bytes per layer; here between layers there are 32 bits).
    """
    element = HALF if bf16 else SINGLE
    one = _layer(shape, element) * tokens * batch + _matrix(shape, element) * tokens**2 * batch
    inputs = SINGLE * shape.hidden * tokens * batch
    kept = shape.layers * inputs + one if checkpointing else shape.layers * one
    # Of a language model: what it puts out, its softmax, and the gradient of that.
    return kept + 3 * SINGLE * shape.vocabulary * tokens * batch


def _layer(shape: Shape, element: int) -> int:
    """Bytes per token, without the matrix of attention."""
    # Inputs of the projections, queries, keys, values, what the output is projected from.
    attention = 5 * shape.hidden
    # Its input; before and after the activation function; if gated, the other factor and the product, too.
    feed_forward = shape.hidden + (4 if shape.gated else 2) * shape.width
    norms = 2 * shape.hidden
    masks = 2 * shape.hidden if shape.dropout else 0
    return element * (attention + feed_forward) + SINGLE * norms + masks


def _matrix(shape: Shape, element: int) -> int:
    """Bytes per token and token: the softmax, and if it is dropped from, the mask and what is left."""
    if not shape.matrix:
        return 0
    return shape.heads * (2 * element + 1 if shape.dropout else element)
