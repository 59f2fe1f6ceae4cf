"""What is measured on the machine at hand; nothing here is imported by the served packages."""
