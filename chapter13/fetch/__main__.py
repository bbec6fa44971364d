"""`python -m chapter13.fetch`: see download.py."""

from chapter13.fetch.download import main

main()
