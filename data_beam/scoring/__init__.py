"""Models inside the corpus jobs: text classifiers and perplexity, applied through RunInference."""
