"""Measurements that print their own verdict; each rewrites docs/results.md."""
