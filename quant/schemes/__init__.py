"""How a weight matrix is quantized; `registry` says what each scheme can do."""
