"""Files: atomic writes, digests, memory maps, the safetensors format, and malformed files.

The ground: imports nothing of jaxgrad. A new file format is a file here, with one reader and one
writer.
"""
