"""The gateway in front of vLLM, and the launcher that starts both."""
