"""The embedding model (SPEED section 3.3) and GISTEmbed's guided loss.

guided_loss     the loss: value and gradient in blocks of rows, and as a module for sentence-transformers
loss_inputs     columns, thresholds, identities of texts, checked
cached_loss     the same with GradCache: a batch larger than memory
triton_kernels  the same on a GPU, tile by tile
guide_cache     the guide's embeddings, once for each text
embedder        LoRA on a decoder, last-token pooling, training
"""
