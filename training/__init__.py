"""Alignment and fine-tuning."""
