"""Source code: what one file says of itself, and how the files of a repository become one document
(the InternLM2 report, section 3.1.2)."""
