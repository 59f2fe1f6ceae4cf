"""OpenAI's API: requests, answers, server-sent events and errors."""
