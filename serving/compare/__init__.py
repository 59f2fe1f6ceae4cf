"""Compare models on the same tokens, for one request or for a sample of the traffic."""
