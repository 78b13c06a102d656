"""Worked examples: an adapter for Hugging Face transformers, and a small Mixtral in plain PyTorch.

They need torch (and transformers), which the package does not: nothing else imports them.
"""
