"""From candidates to a senior generator (SPEED Eq. 2): judge, pairs, DPO.

judge           the best and the worst of several candidates, with reasons
pairs           preference pairs from its verdicts; how often one generator beats another
usable_pairs    which pairs can be trained on
prompt_sharing  one prompt read once for all its completions
dpo             the loss, the reference, the trainer
"""
