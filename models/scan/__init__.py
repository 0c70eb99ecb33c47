"""What is looked at in a file before any library opens it: its structure and what it could make a reader do.

A scan runs nothing of the file. It is depth, not proof: files from strangers are parsed in a confined process all the
same.
"""
