"""What is computed: records, configuration, losses, advantages, KL, ensembles and the buffer.

Pure arithmetic and plain data. Nothing here loads ray, vllm, deepspeed or transformers.
"""
