"""The verbs of the command line, one file each: thin, and light to import."""
