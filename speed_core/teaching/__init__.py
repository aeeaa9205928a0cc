"""For readers and workshops: exercises, widgets, the classroom copy.

exercises  stubs, checkers, solutions
widgets    three things to move in the notebooks
pictures   their still figures
show       code of the package, marked tokens, word diffs
practice   an endpoint that fails by seed
classroom  the students' copy
captions   a sentence for each figure
"""
