"""Images: what a VM is started with, made and inspected by vmactor itself.

Everything here works on open descriptors, reads and writes at offsets and never maps a file into memory:
files are their owner's, who may truncate them at any time.
"""
