"""Files: atomic writes, memory maps, the safetensors format, and what is wrong with a file.

The ground: imports nothing of jaxgrad. A new file format is a file here, with one reader and one
writer.
"""
