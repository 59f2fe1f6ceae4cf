"""What the papers of the variants report, measured on checkpoints; one measure a file."""
