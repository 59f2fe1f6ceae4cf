// A variant's library for quantized caches (attn_kernels/kv_quant.py).
#define QUANTIZED_CACHE
#include "kernel.cpp"
