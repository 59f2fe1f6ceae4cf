"""One attention variant a folder; importing it registers it (`attn_kernels.variant`)."""
