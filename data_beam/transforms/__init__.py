"""Steps between reading and writing: normalising, filtering, removing duplicates, counting."""
