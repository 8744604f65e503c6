"""What is drawn: pages for people (page.py), and figures (figures.py)."""
