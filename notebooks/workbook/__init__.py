"""What the notebooks import beside `speed_core`. `make setup` installs it, so that a notebook finds it wherever it runs.

elsewhere     numbers of the recorded runs beside those of this one
exercises     checkers of the exercises
findings      findings of notebooks 05 and 10 to 12, a line each; what exercises fall back on
measure       log-probabilities of a text, score gains, near-duplicates the slow way
pipeline      one drawing of all stages, the present one filled
rows          the numbers that notebooks 01 to 06 hand to figures
score_tables  notebook 09: scores side by side, their differences
show          code of the package, marked tokens, word diffs, bands of MinHash and their S-curve
widgets       three things to move, and their still figures
"""
