"""The stages of the two papers as functions over a run, what a run would do, and what the papers claim.

stage              the registry: how a stage is declared, made and found
generation_stages  notebooks 01 to 06
embedding_stages   notebooks 07 to 11
planning           every stage, why it would run, what it takes
forecast           time, memory and disk from the recorded run
runs               open a run
claims             each claim, the evidence, a verdict by rule
paper_values       the numbers that the papers print
"""
