"""What is seen of the gateway from outside: metrics, logs and traces."""
