"""`python -m tools.reproduce`: the paper's figures measured by the published commands, and a table to send back."""
