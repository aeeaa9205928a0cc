"""What the notebooks import beside `speed_core`. `make setup` installs it, so that a notebook finds it wherever it runs.

exercises  checkers of the exercises
pipeline   one drawing of all stages, the present one filled
show       code of the package, marked tokens, word diffs
widgets    three things to move, and their still figures
"""
