"""What a request costs in a gateway, ours beside others."""
