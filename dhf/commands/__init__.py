"""The commands of ``python -m dhf``: one file each, with its flags and ``main(argv)``; what they do lives in the rooms below."""
