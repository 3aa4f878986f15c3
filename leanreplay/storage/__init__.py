"""Files, mappings, commits and restore points: a buffer's rows and nothing of what they mean."""
