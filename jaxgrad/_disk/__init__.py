"""Files: atomic writes, and the safetensors format. The ground: imports nothing of jaxgrad.

A new file format is a file here, with one reader and one writer.
"""
