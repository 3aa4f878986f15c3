"""The command line: `leanreplay`, or `python -m leanreplay`. No command imports torch, unless its help says so."""
