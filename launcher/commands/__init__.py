"""What the user types: each file parses, calls and prints for one group of commands. Nothing else prints.

Heavy modules are imported where they are used: `launch --help` answers before pydantic would have loaded.
"""
