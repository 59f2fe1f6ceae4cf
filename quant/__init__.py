"""What 2 to 8 bits cost each attention variant.

`python -m quant.sweep` measures checkpoints x schemes x bits x what is quantized, `python -m
quant.report` writes tables, plots and a page from the results, and `python -m quant.sensitivity`
finds a width for each layer. docs/QUANT.md says what is computed.
"""
