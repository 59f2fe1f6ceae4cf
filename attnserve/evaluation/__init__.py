"""What a model's text quality is measured with: texts, scorers, perplexity, tasks, intervals."""
