"""A page that shows a checkpoint's attention: maps of every head, word by word."""
