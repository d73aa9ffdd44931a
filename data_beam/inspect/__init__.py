"""People look at data: the page about a corpus, and what is known of one document."""
