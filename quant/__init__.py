"""What 2 to 8 bits cost each attention variant.

`python -m quant.sweep` measures checkpoints x targets x schemes x bits, `python -m quant.report`
writes tables, plots and a page from the results, `python -m quant.sensitivity` finds bits for each
layer, and `python -m quant.quantize` writes packed weights. docs/QUANT.md says what is computed.
"""
