"""Companion package of the course on post-training quantization of language models.

It contains the six functions of the book's chapter and the general functions that the notebooks
build on. Reading order: packing, tensors, integer, codebook, then whole_model's layers and linear,
quantize, evaluate.
"""

from chapter13.codebook import quantize_codebook
from chapter13.integer import (
    dequantize_absmax_int8,
    quantize_absmax,
    quantize_absmax_int8,
    quantize_affine,
    quantize_groupwise,
    quantize_int4_absmax,
    quantize_per_channel,
)
from chapter13.memory import model_size_mb
from chapter13.quantize import quantize_model
from chapter13.tensors import QuantizedTensor

__all__ = [
    "QuantizedTensor",
    "dequantize_absmax_int8",
    "model_size_mb",
    "quantize_absmax",
    "quantize_absmax_int8",
    "quantize_affine",
    "quantize_codebook",
    "quantize_groupwise",
    "quantize_int4_absmax",
    "quantize_model",
    "quantize_per_channel",
]
