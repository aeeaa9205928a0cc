"""The embedding model (SPEED section 3.3) and GISTEmbed's guided loss.

guided_loss                 the loss: value and gradient, in blocks of rows
loss_inputs                 its settings, columns, thresholds and ids of texts, checked
triton_kernels              the same on a GPU, tile by tile
sentence_transformers_loss  the loss for its Trainer, also with GradCache: a batch larger than memory
guide_cache                 the guide's embeddings, once for each text
embedder                    a decoder with last-token pooling: built, instructed, loaded
train                       LoRA on it, over synthetic triplets
"""
