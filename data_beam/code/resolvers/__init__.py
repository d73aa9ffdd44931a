"""From the imports of each file to edges between the files of one repository, per language."""
