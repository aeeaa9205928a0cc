"""From candidates to a senior generator (SPEED Eq. 2): judge, pairs, DPO.

judge           the best and the worst of several candidates, with reasons
dpo             the loss, the reference, the trainer
prompt_sharing  one prompt read once for all its completions
"""
