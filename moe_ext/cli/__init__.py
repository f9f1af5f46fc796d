"""The commands demo and doctor; gpt.py and torchrun.py serve the demo."""
