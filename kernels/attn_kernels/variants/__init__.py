"""One attention variant a file; importing a file registers it (`attn_kernels.variant`)."""
