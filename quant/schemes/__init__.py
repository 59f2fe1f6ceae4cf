"""How a weight matrix is quantized, one scheme a file; `registry` says what each can do."""
