"""python -m subspan."""

from subspan.cli import main

main()
