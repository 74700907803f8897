"""Import of the checkpoints that LLaMA-MoE released: v1 (arXiv 2406.16554) and v2 (arXiv 2411.15708).

`commands.py` is the command, `conversion.py` writes the stock checkpoint, `formats.py` knows both formats.
"""
