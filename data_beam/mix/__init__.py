"""From documents and attributes to a corpus: rules, decisions, writing, the funnel, curves."""
