"""Start vLLM and the gateway (`attnserve serve`), and check an environment (`attnserve doctor`)."""
