"""The vLLM servers behind the gateway."""
